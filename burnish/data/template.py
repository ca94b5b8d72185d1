"""A conversation → token ids and the mask of those that are trained. A new template is one row in TEMPLATES."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from burnish.data.rows import Row
from burnish.errors import UserError, did_you_mean

log = logging.getLogger("burnish")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# The fixed prompts of named sets. What a set has beside its question stands in the user's message under the heading that is looked for
# here, so that a conversation without it (in a chat) gets the prompt without it.
ALPACA_FULL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '\n\n' if loop.index0 and messages[loop.index0 - 1]['role'] == 'assistant' else '' }}"
    "{{ 'Below is an instruction that describes a task' }}"
    "{{ ', paired with an input that provides further context' if '\n\n### Input:\n' in message['content'] else '' }}"
    "{{ '. Write a response that appropriately completes the request.\n\n### Instruction:\n' }}"
    "{{ message['content'] + '\n\n### Response:' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
# The space after "Assistant:" belongs to the answer: most tokenizers make it a part of the answer's first token.
GUANACO = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '### Human: ' + message['content'] + '### Assistant:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
)
QNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '\n\n' if loop.index0 and messages[loop.index0 - 1]['role'] == 'assistant' else '' }}"
    "{{ '###Context:\n' if '\n###Question:\n' in message['content'] else '###Question:\n' }}{{ message['content'] + '\n###Answer:\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES: dict[str, str] = {"chatml": CHATML, "alpaca": ALPACA, "alpaca_full": ALPACA_FULL, "guanaco": GUANACO, "qna": QNA}

Turns = Sequence[tuple[str, str]]
BEGINNING = 32
"""Tokens of a text that are a prompt for the rest."""


@dataclass(frozen=True)
class Template:
    """A chat template with its tokenizer, and the system message of every conversation."""

    name: str
    jinja: str
    """To be saved with the tokenizer, so that the served model reads what the trained one read."""
    system: str | None
    tokenizer: Any
    special_ids: frozenset[int]
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    bos_id: int | None = None
    """The token that the tokenizer puts before a text, if any."""

    def encode(self, turns: Turns, system: str | None = None) -> tuple[list[int], list[int]]:
        """(ids, mask) of one conversation of (question, answer) turns; `system` stands in for that of the template.

        The mask is 1 on every answer's tokens and on the token that ends it, and on nothing else; never on the first token.
        """
        return self.encode_all([(turns, system)])[0]

    def encode_all(self, conversations: Sequence[tuple[Turns, str | None]]) -> list[tuple[list[int], list[int]]]:
        """`encode` of each (turns, system). Many at a time cost a third less than one by one."""
        chats = [_messages(self.system if system is None else system, turns) for turns, system in conversations]
        answers = [[at for at, message in enumerate(chat) if message["role"] == "assistant"] for chat in chats]
        befores = iter(self._render_all([chat[:at] for chat, places in zip(chats, answers, strict=True) for at in places], prompt=True))
        throughs = iter(self._render_all([chat[: at + 1] for chat, places in zip(chats, answers, strict=True) for at in places]))
        texts: list[str] = []
        spans: list[list[tuple[int, int, int]]] = []
        for chat, places in zip(chats, answers, strict=True):
            parts = [(next(befores), next(throughs), chat[at]["content"]) for at in places]
            texts.append(parts[-1][1])  # through the last answer: all of it
            spans.append([self._span(texts[-1], *part, several=len(parts) > 1) for part in parts])
        return [self._masked(encoded, spans_of) for encoded, spans_of in zip(self.tokens_of(texts), spans, strict=True)]

    def tokens_of(self, texts: list[str]) -> list[Any]:
        """A `tokenizers.Encoding` of each text, with nothing put before or after it."""
        if not texts:
            return []
        wanted = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(texts, **wanted).encodings

    def prompt(self, question: str, history: Turns = (), system: str | None = None) -> list[int]:
        """Ids up to where the answer to `question` begins; the same as those that training had before it."""
        messages = [*_messages(self.system if system is None else system, history), {"role": "user", "content": question.strip()}]
        return self.tokens_of([self.render(messages, prompt=True)])[0].ids

    def prompt_of(self, row: Row) -> list[int]:
        """The prompt that asks a row's question, a conversation's last one after its history. Of plain text, the beginning."""
        if row.is_text:
            return self.tokens_of([row.answer])[0].ids[:BEGINNING]
        return self.prompt(row.question, row.history, row.system)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: up to the first token that ends it, without special tokens."""
        ends = [at for at, token in enumerate(ids) if int(token) in self.stop_ids]
        answer = list(ids[: ends[0]] if ends else ids)
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    def render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        """The text of a conversation; with `prompt`, up to where the next answer begins."""
        return _render(self.tokenizer, self.jinja, messages, prompt, self.name)

    def _render_all(self, chats: list[list[dict[str, str]]], prompt: bool = False) -> list[str]:
        """`render` of each, in one call."""
        from jinja2 import TemplateError

        if not chats:
            return []
        try:
            return self.tokenizer.apply_chat_template(chats, chat_template=self.jinja, tokenize=False, add_generation_prompt=prompt)
        except TemplateError:
            return [self.render(chat, prompt) for chat in chats]  # one of them is refused, with its reason

    def _masked(self, encoded: Any, spans: list[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
        ids = encoded.ids
        mask = [0] * len(ids)
        for start, answer_end, end in spans:
            first, stop = _token_at(encoded, start), self._stop(encoded, ids, answer_end, end)
            mask[first : stop + 1] = [1] * (stop + 1 - first)
        if mask:
            mask[0] = 0
        return ids, mask

    def _span(self, text: str, before: str, through: str, words: str, several: bool) -> tuple[int, int, int]:
        """(start, end of the answer's words, end of what the template writes after it) in the rendered text.

        `before` is rendered up to the answer, `through` with it; each must be how the text begins, else training and serving differ.
        """
        found = through.find(words, len(before))
        if not text.startswith(through) or not through.startswith(before) or found < 0:
            one_turn = " or set data.turns=1" if several else ""
            raise UserError(
                f"The chat template {self.name!r} writes a conversation differently once an answer follows, so it cannot be told "
                f"which tokens are the answer. Choose another with data.template ({', '.join(TEMPLATES)}){one_turn}."
            )
        return len(before), found + len(words), len(through)

    def _stop(self, encoded: Any, ids: list[int], answer_end: int, end: int) -> int:
        """The place of the token that ends the answer: the first special one after its words."""
        for token in range(_token_at(encoded, answer_end), len(ids)):
            start, _ = encoded.token_to_chars(token)
            if start >= end:
                break
            if start >= answer_end and ids[token] in self.special_ids:
                return token
        raise UserError(
            f"The chat template {self.name!r} writes no token that ends an answer, so the model would never learn to stop. "
            f"Choose another with data.template: {', '.join(TEMPLATES)}."
        )


def _token_at(encoded: Any, place: int) -> int:
    """The first token that ends after a place in the text."""
    token = encoded.char_to_token(place)
    if token is None:  # no token has this character: white space that a tokenizer drops, say
        token = next((at for at, (_, end) in enumerate(encoded.offsets) if end > place), len(encoded.ids))
    return token


def choose_template(tokenizer: Any, name: str = "auto", system: str | None = None) -> Template:
    """The tokenizer's own template (`auto`), or `alpaca` where it has none; its own alone (`own`); or one of TEMPLATES by name."""
    own = getattr(tokenizer, "chat_template", None)
    if name == "own" and not (isinstance(own, str) and own):
        raise UserError(f"data.template = 'own', but the tokenizer has no chat template. Choose another: {', '.join(TEMPLATES)}.")
    if name in ("auto", "own"):
        name, jinja = ("own", own) if isinstance(own, str) and own else ("alpaca", ALPACA)
    elif name in TEMPLATES:
        jinja = TEMPLATES[name]
    else:
        raise UserError(f"data.template = {name!r}: no such template.{did_you_mean(name, ['auto', 'own', *TEMPLATES])}")
    _require(tokenizer, name)
    if name == "own" and system is None:
        jinja = _without_default_system(tokenizer, jinja)
    jinja = _with_one_bos(tokenizer, jinja, name, system)
    template = Template(name, jinja, system, tokenizer, _specials(tokenizer))
    ids, mask = template.encode([("Question", "Answer")])
    end = ids[max(at for at, trained in enumerate(mask) if trained)]
    return replace(template, stop_ids=frozenset({end, tokenizer.eos_token_id} - {None}), bos_id=_added_bos(tokenizer))


def _require(tokenizer: Any, name: str) -> None:
    """What a template needs of a tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("The tokenizer is a slow one and tells no places of tokens in the text. Use a model that has a tokenizer.json.")
    if "eos_token" in TEMPLATES.get(name, "") and tokenizer.eos_token is None:
        raise UserError(f"The template {name!r} ends an answer with the end-of-text token, but the tokenizer names none (eos_token).")
    if name == "chatml":
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
        if missing:
            lacks = f"needs the tokens {', '.join(missing)}, which the tokenizer lacks"
            raise UserError(f"The template 'chatml' {lacks}. Set data.template=alpaca.")


# --- rendering and tokens


def _messages(system: str | None, turns: Turns) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()}]
    return messages


def _render(tokenizer: Any, jinja: str, messages: list[dict[str, str]], prompt: bool, name: str) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as problem:
        told = messages[0]["role"] == "system"
        way_out = f"{'Leave out the system message (data.system), or choose' if told else 'Choose'} another template."
        raise UserError(f"The chat template {name!r} refuses the conversation: {problem}. {way_out}") from None


def _specials(tokenizer: Any) -> frozenset[int]:
    """Tokens that plain words never become: those that the tokenizer marks as special."""
    marked = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | marked


# --- what a tokenizer's own template does on its own


def _with_one_bos(tokenizer: Any, jinja: str, name: str, system: str | None) -> str:
    """The template with the beginning-of-text token written by itself, where the tokenizer would put one and the template does not.

    So that training, serving and any other reader of the template agree, none of them letting the tokenizer add one.
    """
    bos = _added_bos(tokenizer)
    if bos is None:
        return jinja
    text = _render(tokenizer, jinja, _messages(system, [("Question", "Answer")]), False, name)
    written = tokenizer(text, add_special_tokens=False)["input_ids"]
    if written[:2] == [bos, bos]:
        begins = f"begins a conversation with two {tokenizer.bos_token} tokens"
        raise UserError(f"The chat template {name!r} {begins}. Choose another with data.template.")
    return jinja if written[:1] == [bos] else "{{ bos_token }}" + jinja


def _added_bos(tokenizer: Any) -> int | None:
    """The beginning-of-text token, where the tokenizer puts it before what it is given."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _without_default_system(tokenizer: Any, jinja: str) -> str:
    """The template without the system message that it puts in where a conversation has none.

    The message must stand in the template's source as one literal; what is left must render everything else as before.
    """
    user = {"role": "user", "content": "Question"}
    alone = _render(tokenizer, jinja, [user], False, "own")
    try:
        told = _render(tokenizer, jinja, [{"role": "system", "content": "Marker"}, user], False, "own")
    except UserError:
        return jinja  # no system messages at all
    before, marker, after = told.partition("Marker")
    bos = tokenizer.bos_token or ""
    if not marker or not before.removeprefix(bos) or not alone.startswith(before):
        return jinja
    return _cut_literal(tokenizer, jinja, alone, told, after)


def _cut_literal(tokenizer: Any, jinja: str, alone: str, told: str, after: str) -> str:
    """The template without the longest literal that `alone` begins with, where that is all that it changes; else as it is."""
    for end in range(len(alone) - 1, 0, -1):
        if not after.endswith(alone[end:]):
            break  # what is left would still hold a part of the message
        for literal in (alone[:end], alone[:end].replace("\n", "\\n")):
            if literal not in jinja:
                continue
            shorter = jinja.replace(literal, "")
            user = {"role": "user", "content": "Question"}
            same = _render(tokenizer, shorter, [{"role": "system", "content": "Marker"}, user], False, "own") == told
            if same and _render(tokenizer, shorter, [user], False, "own") == alone[end:]:
                return shorter
    # A date, say: kept as it is, so that what is served is still what was trained
    log.warning("the chat template puts in a system message of its own, which stays: %r", alone[:200])
    return jinja
