"""What one object of a file says. A new row format is one function and one row in FORMATS."""

from collections.abc import Callable
from typing import Any, NamedTuple

LONGEST_TURN = 4 << 20
"""Characters of one turn. No context holds as many; plain text, which is cut into contexts, may be longer."""


class Parts(NamedTuple):
    """What a format finds in an object: the turns of a conversation, or a text."""

    turns: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    text: str | None = None


class Format(NamedTuple):
    """A row has this format if it has all the keys of `needs`, in the list under the key `inside` where there is one."""

    needs: frozenset[str]
    read: Callable[[dict[str, Any]], Parts]
    example: str
    inside: str | None = None


class Bad(Exception):
    """Why one row cannot be used; collected, so that a file's problems are all told at once."""


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], Parts]:
    return lambda entry: Parts(((filled(entry[question], question), filled(entry[answer], answer)),))


def _alpaca(entry: dict[str, Any]) -> Parts:
    addition = entry.get("input")
    if addition is not None and not isinstance(addition, str):
        raise Bad(f"its input is {kind(addition)}, not text")
    question, answer = filled(entry["instruction"], "instruction"), filled(entry["output"], "output")
    return Parts(((f"{question}\n\n{filled(addition, 'input')}" if addition and addition.strip() else question, answer),))


def _messages(entry: dict[str, Any]) -> Parts:
    return _conversation(entry["messages"], "messages", "role", "content", {role: role for role in ("system", "user", "assistant")})


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"
)


def _sharegpt(entry: dict[str, Any]) -> Parts:
    return _conversation(entry["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)


def _text(entry: dict[str, Any]) -> Parts:
    text = entry["text"]
    if not isinstance(text, str):
        raise Bad(f"its text is {kind(text)}, not text")
    if not text.strip():
        raise Bad("its text is empty")
    return Parts(text=_whole_letters(text.replace("\r\n", "\n").replace("\r", "\n"), "its text"))


FORMATS: dict[str, Format] = {
    "messages": Format(frozenset({"messages"}), _messages, "messages: a list of {role, content}"),
    "sharegpt": Format(frozenset({"conversations"}), _sharegpt, "conversations: a list of {from, value}"),
    "alpaca": Format(frozenset({"instruction", "output"}), _alpaca, "instruction, input (optional), output"),
    "question": Format(frozenset({"question", "answer"}), _pair("question", "answer"), "question, answer"),
    "faq": Format(
        frozenset({"question", "answer"}), _pair("question", "answer"), '{"questions": a list of {question, answer}}', inside="questions"
    ),
    "prompt": Format(frozenset({"prompt", "completion"}), _pair("prompt", "completion"), "prompt, completion"),
    "text": Format(frozenset({"text"}), _text, "text"),
}
"""In the order in which they are tried: a row with `text` beside other keys of a format has that other format."""

EXAMPLES = "; or ".join(form.example for form in FORMATS.values())
UNKNOWN = "which are those of no format"


def format_of(entry: dict[str, Any], inside: str | None) -> str:
    """The name of the format whose keys a row has. Raises `Bad` with the keys that are missing from the nearest."""
    formats = {name: form for name, form in FORMATS.items() if form.inside == inside}
    for name, form in formats.items():
        if form.needs <= entry.keys():
            return name
    for name, form in formats.items():
        if form.needs & entry.keys():
            raise Bad(lacking(name, entry))
    raise Bad(f"has the keys {', '.join(map(str, entry)) or '(none)'}, {UNKNOWN}")


def lacking(name: str, entry: dict[str, Any]) -> str:
    """What a row lacks of a format."""
    return f"lacks {', '.join(sorted(FORMATS[name].needs - entry.keys()))} (the format {name!r} is {FORMATS[name].example})"


# --- conversations

_TOOLS = frozenset({"tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython"})


def _conversation(messages: Any, name: str, role_key: str, text_key: str, roles: dict[str, str]) -> Parts:
    """Turns of user and assistant in alternation, with a system message before them at most. Raises `Bad` for every other order."""
    if not isinstance(messages, list):
        raise Bad(f"its {name} is {kind(messages)}, not a list")
    said = [_message(message, number, role_key, text_key, roles) for number, message in enumerate(messages, 1)]
    system = said[0][1] if said and said[0][0] == "system" else None
    first = 0 if system is None else 1
    _check_order([role for role, _ in said], first)
    texts = [text for _, text in said[first:]]
    return Parts(tuple(zip(texts[::2], texts[1::2], strict=True)), system)


def _message(message: Any, number: int, role_key: str, text_key: str, roles: dict[str, str]) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise Bad(f"message {number} is {kind(message)}, not an object")
    role = message.get(role_key)
    if str(role) in _TOOLS or any(message.get(key) for key in ("tool_calls", "function_call", "tool_call_id")):
        raise Bad(f"message {number} uses a tool; conversations with tools cannot be trained. Leave such rows out")
    if missing := [key for key in (role_key, text_key) if key not in message]:
        raise Bad(f"message {number} lacks {', '.join(missing)}")
    if not isinstance(role, str) or role not in roles:
        raise Bad(f"message {number} has the {role_key} {role!r}; known: {', '.join(roles)}")
    if message.get("weight") == 0:
        raise Bad(f"message {number} has a weight of 0, but every answer of a conversation is trained. Leave the row out")
    return roles[role], filled(message[text_key], text_key, f"message {number} ({role})")


def _check_order(roles: list[str], first: int) -> None:
    if "system" in roles[first:]:
        raise Bad(f"message {roles.index('system', first) + 1} is a system message; only the first may be one")
    if not roles[first:]:
        raise Bad("has no messages" if not first else "has a system message alone")
    if "assistant" not in roles:
        raise Bad("has no assistant turn: nothing of it would be trained")
    if roles[first] == "assistant":
        raise Bad("begins with the assistant. Remove that turn, or put the user's turn before it")
    for number, (one, other) in enumerate(zip(roles[first:], roles[first + 1 :], strict=False), first + 1):
        if one == other:
            raise Bad(f"has two {one} turns in a row (messages {number} and {number + 1}). Join them, or leave one out")
    if roles[-1] == "user":
        raise Bad("ends with a user turn that nobody answers. Remove that turn")


# --- values


def filled(value: Any, name: str, owner: str = "") -> str:
    """Text without spaces around it, its line ends `\\n`. `owner` stands before `name` where it is not the row itself."""
    whose = f"{owner}'s {name}" if owner else f"its {name}"
    if not isinstance(value, str):
        raise Bad(f"{whose} is {kind(value)}, not text")
    text = value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise Bad(f"{whose} is empty")
    if len(text) > LONGEST_TURN:
        raise Bad(f"{whose} has {len(text):,} characters, more than any context holds. Cut it up, or give it as plain text (`text`)")
    return _whole_letters(text, whose)


def _whole_letters(text: str, whose: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            half = f"\\u{ord(text[problem.start]):04x}"
            raise Bad(f"{whose} has {half} alone, half of a letter: it was cut in the middle of one") from None
    return text


def kind(value: Any) -> str:
    """`a list`, `null`, …, as JSON calls values."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), f"of type {type(value).__name__}")
