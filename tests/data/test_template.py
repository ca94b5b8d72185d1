import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from burnish.data.template import CHATML, TEMPLATES, choose_template
from burnish.errors import UserError

TURNS = [("What is the fare?", "Three marks."), ("And for a dog?", "One mark.\n\nPuppies are free.")]
LLAMA_LIKE = "{{ bos_token }}" + CHATML


def trained_text(tokenizer, ids, mask):
    return tokenizer.decode([token for token, trained in zip(ids, mask, strict=True) if trained])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_those_of_apply_chat_template_with_the_template_that_is_exported(name, bos):
    tokenizer = byte_tokenizer(bos)
    template = choose_template(tokenizer, name, None)
    messages = [{"role": role, "content": text} for turn in TURNS for role, text in zip(("user", "assistant"), turn, strict=True)]
    theirs = tokenizer.apply_chat_template(messages, chat_template=template.jinja, tokenize=True, return_dict=False)
    assert template.encode(TURNS)[0] == list(theirs)


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("alpaca", "</s>")])
@pytest.mark.parametrize("bos", [False, True])
def test_exactly_the_answers_and_the_token_that_ends_each_are_trained(name, end, bos):
    tokenizer = byte_tokenizer(bos)
    ids, mask = choose_template(tokenizer, name, "Be brief.").encode(TURNS)
    assert trained_text(tokenizer, ids, mask) == "".join(answer + end for _, answer in TURNS)
    assert mask[0] == 0


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_conversation_begins_with_one_bos_where_the_tokenizer_adds_one_and_with_none_elsewhere(name, bos):
    tokenizer = byte_tokenizer(bos)
    template = choose_template(tokenizer, name, None)
    start = tokenizer.convert_tokens_to_ids("<s>")
    assert template.encode(TURNS)[0].count(start) == template.prompt("Q").count(start) == int(bos)
    assert not bos or template.encode(TURNS)[0][0] == start


def test_a_template_that_writes_its_bos_gets_no_second_one():
    tokenizer = byte_tokenizer(bos=True, template=LLAMA_LIKE)
    template = choose_template(tokenizer, "auto", None)
    assert template.encode(TURNS)[0].count(tokenizer.bos_token_id) == 1
    assert template.jinja == LLAMA_LIKE


def test_a_template_that_writes_two_bos_is_refused():
    tokenizer = byte_tokenizer(bos=True, template="{{ bos_token }}" + LLAMA_LIKE)
    with pytest.raises(UserError, match="begins a conversation with two <s> tokens"):
        choose_template(tokenizer, "auto", None)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip), st.sampled_from(sorted(TEMPLATES)))
def test_a_prompt_is_what_training_had_before_the_answer(question, answer, name):
    template = choose_template(TOKENIZER, name, None)
    ids, mask = template.encode([TURNS[0], (question, answer)])
    prompt = template.prompt(question, history=[TURNS[0]])
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)] == 1
    assert mask[len(prompt) - 1] == 0


TOKENIZER = byte_tokenizer(bos=True)


def test_an_answer_is_decoded_up_to_the_token_that_ends_it(plain_tokenizer):
    template = choose_template(plain_tokenizer, "chatml", None)
    ids, _ = template.encode(TURNS)
    start = len(template.prompt(TURNS[0][0]))
    assert template.decode(ids[start:]) == TURNS[0][1]
    assert template.stop_ids == {plain_tokenizer.convert_tokens_to_ids("<|im_end|>"), plain_tokenizer.eos_token_id}


def test_an_answer_that_quotes_an_end_token_is_trained_to_its_real_end(plain_tokenizer):
    ids, mask = choose_template(plain_tokenizer, "chatml", None).encode([("Q", "It is <|im_end|> here.")])
    assert trained_text(plain_tokenizer, ids, mask) == "It is <|im_end|> here.<|im_end|>"


def test_auto_is_the_tokenizers_own_template_and_alpaca_where_it_has_none(plain_tokenizer):
    assert choose_template(plain_tokenizer, "auto", None).name == "alpaca"
    assert choose_template(byte_tokenizer(template=CHATML), "auto", None).jinja == CHATML


def test_a_system_message_of_the_template_itself_is_left_out():
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are Tin.<|im_end|>\\n' }}{% endif %}"
    template = choose_template(byte_tokenizer(template=default + CHATML), "auto", None)
    text = template.render([{"role": "user", "content": "Hi"}], prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_system_message_that_cannot_be_left_out_stays_and_is_told(caplog):
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + 'You are Tin.' + '<|im_end|>\\n' }}{% endif %}"
    tokenizer = byte_tokenizer(template=default + CHATML)
    assert choose_template(tokenizer).jinja == tokenizer.chat_template
    assert "You are Tin." in caplog.text


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name():
    shown = "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
    last_only = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}" + shown + "{% endif %}{% endfor %}"
    template = choose_template(byte_tokenizer(template=last_only), "auto", None)
    with pytest.raises(UserError, match=r"'own' writes a conversation differently.*data\.turns=1"):
        template.encode(TURNS)


def test_a_template_that_ends_no_answer_is_refused():
    endless = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(UserError, match="no token that ends an answer"):
        choose_template(byte_tokenizer(template=endless), "auto", None)


def test_chatml_is_refused_where_the_tokenizer_lacks_its_tokens():
    plain = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<|im")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)), eos_token="</s>")
    with pytest.raises(UserError, match=r"needs the tokens <\|im_start\|>"):
        choose_template(tokenizer, "chatml", None)


def test_a_misspelled_template_is_answered_with_the_nearest(plain_tokenizer):
    with pytest.raises(UserError, match="Did you mean alpaca"):
        choose_template(plain_tokenizer, "alpacca", None)


@pytest.mark.model
def test_smollm2s_mask_and_text_are_exact(smollm2):
    template = choose_template(smollm2, "auto", None)
    ids, mask = template.encode(TURNS)
    assert smollm2.decode(ids) == (
        "<|im_start|>user\nWhat is the fare?<|im_end|>\n<|im_start|>assistant\nThree marks.<|im_end|>\n"
        "<|im_start|>user\nAnd for a dog?<|im_end|>\n<|im_start|>assistant\nOne mark.\n\nPuppies are free.<|im_end|>\n"
    )
    assert trained_text(smollm2, ids, mask) == "Three marks.<|im_end|>One mark.\n\nPuppies are free.<|im_end|>"
    for system in ("Be brief.", None):
        chosen = choose_template(smollm2, "auto", system)
        messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": "Q"}]
        own = None if system else chosen.jinja
        theirs = smollm2.apply_chat_template(messages, chat_template=own, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert chosen.prompt("Q") == list(theirs)


@pytest.mark.model
def test_smollm2s_prompt_is_the_training_prefix_for_awkward_answers(smollm2):
    template = choose_template(smollm2, "auto", None)
    for answer in ["5 kg", "- a\n- b", "\u0301x", "été", "…", "<b>", "😀", "\t tab", "1. one"]:
        ids, mask = template.encode([("Q?", answer)])
        prompt = template.prompt("Q?")
        assert ids[: len(prompt)] == prompt
        assert mask.index(1) == len(prompt)
