"""Talking to a model in the terminal: `chat`, over `answer`, which gives the text as it comes."""

from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import DynamicCache

from burnish.data.template import Template, Turns
from burnish.errors import UserError
from burnish.model.network import context_of
from burnish.skeleton import Built

_HELP = "/new forgets the conversation, /base switches between the tuned model and its base, /quit or Ctrl-D ends, Ctrl-C stops an answer"
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # an answer must not steer the terminal
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def answer(built: Built, template: Template, question: str, history: Turns, new_tokens: int, temperature: float = 0.0) -> Iterator[str]:
    """The answer to `question` after `history`, in pieces of text as they come; together they are its text, without special tokens.

    Ends at a token that ends an answer, after `new_tokens` tokens, or at the end of the model's context. `temperature` 0 takes the most
    probable token each time. Costs one pass over the prompt and one for each token; stops where the caller stops asking.
    Raises a `UserError` where question and history leave no room for an answer: see `fitting`.
    """
    prompt = template.prompt(question, history)
    room = context_of(built.model.config) - len(prompt)
    if room < 1:
        raise UserError(
            f"The question takes all of the {context_of(built.model.config)} tokens that the model can read. Ask a shorter one."
        )
    return _pieces(template, _tokens(built, template.stop_ids, prompt, min(new_tokens, room), temperature))


def fitting(built: Built, template: Template, question: str, history: Turns, new_tokens: int) -> Turns:
    """The newest turns of `history` that leave room for the question and an answer of `new_tokens` tokens, or of half the context."""
    room = context_of(built.model.config) - min(new_tokens, context_of(built.model.config) // 2)
    kept = list(history)
    while kept and len(template.prompt(question, kept)) > room:
        kept = kept[1:]
    return kept


def _tokens(built: Built, stop_ids: frozenset[int], prompt: list[int], new_tokens: int, temperature: float) -> Iterator[int]:
    """The tokens of an answer, without the one that ends it."""
    model = built.model.eval()
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt], device=model.device)
    for _ in range(new_tokens):
        with torch.no_grad():
            logits_V = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        token = _draw(logits_V, temperature)
        if token in stop_ids:
            return
        yield token
        ids = torch.tensor([[token]], device=model.device)


def _draw(logits_V: Tensor, temperature: float) -> int:
    if temperature <= 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(torch.softmax(logits_V.float() / temperature, dim=-1), 1))


def _pieces(template: Template, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes certain: a character of several tokens is held back until it is whole, white space until something follows it.

    The whole answer is decoded again with each token, since a token's text depends on those before it: microseconds beside a forward pass.
    """
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = template.decode(ids)
        if text.startswith(shown) and not text.endswith(_UNFINISHED) and text != shown:
            yield text[len(shown) :]
            shown = text
    rest = template.decode(ids)
    if rest.startswith(shown) and rest != shown:
        yield rest[len(shown) :]


# --- the terminal


class _Conversation:
    """What a chat remembers: the turns so far, and which model answers (the switch of `built`)."""

    def __init__(self, built: Built, console: Console) -> None:
        self.built, self.console = built, console
        self.turns: list[tuple[str, str]] = []

    def new(self) -> None:
        self.turns.clear()
        self.say("A new conversation.")

    def base(self) -> None:
        if not self.built.adapters.holds_base:
            self.say("The base is not here to answer: this training changed weights of the base itself.")
            return
        switch = self.built.adapters.switch
        switch.on = not switch.on
        self.say("The tuned model answers now." if switch.on else "The untuned base answers now.")

    def help(self) -> None:
        self.say(f"{_HELP}.")

    def say(self, words: str) -> None:
        self.console.print(escape(words), style="dim")


_COMMANDS: dict[str, Callable[[_Conversation], None]] = {
    "/new": _Conversation.new,
    "/base": _Conversation.base,
    "/help": _Conversation.help,
}


def chat(built: Built, template: Template, new_tokens: int, console: Console | None = None, read: Callable[[str], str] = input) -> None:
    """Answers what `read` gives until it gives `/quit` or raises EOFError. The adapters' switch is afterwards as it was before."""
    conversation = _Conversation(built, console or Console())
    conversation.help()
    switch = built.adapters.switch
    before = switch.on
    try:
        while (line := _line(read, "you> " if switch.on else "you (to the base)> ")) != "/quit":
            if line in _COMMANDS:
                _COMMANDS[line](conversation)
            elif line.startswith("/"):
                conversation.say(f"{line.split()[0]} is no command: {_HELP}.")
            elif line:
                _turn(conversation, template, line, new_tokens)
    finally:
        switch.on = before


def _line(read: Callable[[str], str], sign: str) -> str:
    try:
        return read(sign).strip()
    except EOFError:
        return "/quit"


def _turn(conversation: _Conversation, template: Template, question: str, new_tokens: int) -> None:
    """One question and its answer. What was said before Ctrl-C belongs to the conversation; a turn that got no answer does not."""
    built, console = conversation.built, conversation.console
    kept = fitting(built, template, question, conversation.turns, new_tokens)
    dropped = len(conversation.turns) - len(kept)
    if dropped:
        conversation.say(f"The conversation is longer than the model's context: its oldest {_turns(dropped)} forgotten.")
        conversation.turns = list(kept)
    said = ""
    try:
        for piece in answer(built, template, question, kept, new_tokens):
            console.file.write(piece.translate(_CONTROLS))  # not through rich, which would read markup and widen tabs
            console.file.flush()
            said += piece
    except KeyboardInterrupt:
        conversation.say(" (stopped)")
    except UserError as problem:
        conversation.say(str(problem))
    else:
        console.print()
    if said:
        conversation.turns.append((question, said))


def _turns(count: int) -> str:
    return "turn is" if count == 1 else f"{count} turns are"
