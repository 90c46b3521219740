"""Checks the OpenAI endpoints through the openai package, which validates every answer strictly, and what goes over the wire through httpx."""
import asyncio
import contextlib
import json
import math
import socket
import statistics
import threading
import time

import httpx
import openai
import pytest

from conftest import check_error, lenient, strict
from nodes import ENDLESS, PROMPT, wait_for

MODEL = "tiny"
CONTEXT = 512
FREED_WITHIN = 0.2  # seconds
STORY = [{"role": "user", "content": "Tell me a story."}]
PROMPTS = [PROMPT, "def main():", "春", "The king said", "fn fmt(", "USER: I want a pizza.\nASSISTANT:", "Sec. 12. (a)", "O thou"]


def complete(client, prompt=PROMPT, **more):
    """A completion by the likeliest tokens, 24 of them, unless told otherwise."""
    client = lenient(client) if more.get("stream") else client
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 24, **more})


def chat(client, messages=STORY, **more):
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, "temperature": 0, **more})


def text_of(answer):
    return answer.choices[0].text


def content_of(answer):
    return answer.choices[0].message.content


def streamed_text(chunks):
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


def streamed_content(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def sampled(client, **more):
    return text_of(complete(client, **{"temperature": 1, "top_p": 1, "max_tokens": 32, "extra_body": {"top_k": 0}, **more}))


# ---- answers

def test_chat_answers(client):
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert len(answer.choices) == 1 and answer.choices[0].index == 0
    assert answer.choices[0].message.role == "assistant"
    assert content_of(answer), answer
    assert abs(answer.created - time.time()) < 100, f"created is {answer.created}, in seconds of 1970"
    assert answer.id


def test_a_completion_answers(client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert len(answer.choices) == 1 and answer.choices[0].index == 0
    assert text_of(answer), answer


def test_ids_of_answers_differ(client):
    assert complete(client).id != complete(client).id


def test_the_answer_names_the_model(client):
    known = {model.id for model in client.models.list()}
    assert complete(client).model in known
    assert chat(client).model in known


def test_async_chat(tiny):
    async def ask():
        async with strict(tiny, openai.AsyncOpenAI) as client:
            return content_of(await chat(client))
    with strict(tiny) as client:
        assert asyncio.run(ask()) == content_of(chat(client))


def test_async_completion(tiny):
    async def ask():
        async with strict(tiny, openai.AsyncOpenAI) as client:
            return text_of(await complete(client))
    with strict(tiny) as client:
        assert asyncio.run(ask()) == text_of(complete(client))


def test_async_streams(tiny):
    async def ask():
        async with strict(tiny, openai.AsyncOpenAI) as client:
            story = streamed_content([chunk async for chunk in await chat(client, stream=True)])
            return story, streamed_text([chunk async for chunk in await complete(client, stream=True)])
    with strict(tiny) as client:
        assert asyncio.run(ask()) == (content_of(chat(client)), text_of(complete(client)))


# ---- the tokens are the model's

@pytest.mark.parametrize("prompt", PROMPTS)
def test_temperature_0_is_what_run_generates(tiny, client, prompt):
    alone = tiny.node.run(prompt, "--raw", "--max-tokens", "24")
    answer = complete(client, prompt, extra_body={"return_token_ids": True})
    assert text_of(answer) == alone["text"]
    assert answer.choices[0].token_ids == alone["tokens"]
    assert answer.choices[0].finish_reason == alone["stop_reason"]


def test_a_chat_is_what_run_generates_with_the_template(tiny, client):
    alone = tiny.node.run(STORY[0]["content"])
    answer = chat(client, extra_body={"return_token_ids": True})
    assert content_of(answer) == alone["text"]
    assert answer.choices[0].token_ids == alone["tokens"]
    assert answer.choices[0].finish_reason == alone["stop_reason"] == "stop"


def test_a_chat_is_the_completion_of_the_template(client):
    messages = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "A coffee, please."},
    ]
    template = "Be kind.\nUSER: Hello.\nASSISTANT: Hi.\nUSER: A coffee, please.\nASSISTANT:"
    answer, same = chat(client, messages, max_tokens=40), complete(client, template, max_tokens=40)
    assert content_of(answer) == text_of(same)
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens


def test_the_role_developer_is_system(client):
    def ask(role):
        return chat(client, [{"role": role, "content": "Speak of coffee."}, *STORY])
    assert content_of(ask("developer")) == content_of(ask("system"))
    assert ask("developer").usage.prompt_tokens > chat(client).usage.prompt_tokens


def test_text_parts_are_joined(client):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story."}]
    assert content_of(chat(client, [{"role": "user", "content": parts}])) == content_of(chat(client))


def test_token_ids_as_a_prompt(client):
    ids = complete(client, extra_body={"return_token_ids": True}).choices[0].token_ids
    answer = complete(client, ids)
    assert answer.usage.prompt_tokens == len(ids) == 24
    assert text_of(answer) == text_of(complete(client, text_of(complete(client))))


def test_a_list_of_one_text_as_a_prompt(client):
    assert text_of(complete(client, [PROMPT])) == text_of(complete(client))


# ---- sampling

def test_the_same_seed_gives_the_same_text(client):
    assert sampled(client, seed=7) == sampled(client, seed=7)
    assert content_of(chat(client, temperature=1, seed=7)) == content_of(chat(client, temperature=1, seed=7))


def test_other_seeds_give_other_texts(client):
    assert len({sampled(client, seed=seed) for seed in (1, 2, 3, 4)}) == 4


def test_without_a_seed_each_time_is_another(client):
    assert len({sampled(client) for _ in range(4)}) > 1


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 - 1, -(2**63)])
def test_any_integer_is_a_seed(client, seed):
    assert sampled(client, seed=seed) == sampled(client, seed=seed)


def test_the_smallest_top_p_takes_the_likeliest(client):
    assert text_of(complete(client, temperature=1, top_p=1e-6, seed=3)) == text_of(complete(client))


def test_top_k_1_takes_the_likeliest(client):
    assert text_of(complete(client, temperature=2, seed=3, extra_body={"top_k": 1})) == text_of(complete(client))


def test_top_p_makes_a_difference(client):
    assert sampled(client, seed=5, top_p=0.1) != sampled(client, seed=5, top_p=1)


def test_a_repetition_penalty_makes_a_difference(client):
    long = {"max_tokens": 60}
    assert text_of(complete(client, extra_body={"repetition_penalty": 1.5}, **long)) != text_of(complete(client, **long))


def test_sampling_is_by_default_as_the_authors_say(client):
    authors = {"temperature": 0.7, "top_p": 0.9, "extra_body": {"top_k": 20}}
    plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, seed=11)
    told = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=40, seed=11, **authors)
    assert text_of(plain) == text_of(told)
    assert text_of(plain) != text_of(complete(client, max_tokens=40)), "sampled, not the likeliest"


# ---- where an answer ends

def test_max_tokens(client):
    answer = chat(client, max_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_max_completion_tokens(client):
    answer = chat(client, max_completion_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    assert content_of(answer) == content_of(chat(client, max_tokens=3))


def test_a_chat_ends_by_itself(client):
    assert chat(client).choices[0].finish_reason == "stop"


def test_completions_have_16_tokens_by_default(client):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_an_answer_ends_where_the_context_does(client):
    answer = chat(client, ENDLESS)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (CONTEXT, "length")


def tokens_as_bytes(client):
    """The likeliest tokens after the prompt, each as its bytes."""
    answer = chat(client, logprobs=True, max_tokens=40)
    return [bytes(token.bytes) for token in answer.choices[0].logprobs.content]


def test_stop_at_one_text(client):
    whole = text_of(complete(client))
    answer = complete(client, stop=" house")
    assert " house" in whole
    assert text_of(answer) == whole.split(" house")[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24


def test_stop_at_the_first_of_several(client):
    whole = text_of(complete(client))
    answer = complete(client, stop=["not there", " house", " taken", "#"])
    assert text_of(answer) == min(whole.split(" house")[0], whole.split(" taken")[0], key=len)
    assert answer.choices[0].finish_reason == "stop"


def test_stop_across_the_borders_of_tokens(client):
    tokens = tokens_as_bytes(client)
    whole = content_of(chat(client))
    for first, second in zip(tokens, tokens[1:]):
        stop = (first[-2:] + second[:2]).decode()
        answer = chat(client, stop=stop)
        assert content_of(answer) == whole.split(stop)[0], f"stop {stop!r}"
        assert answer.choices[0].finish_reason == "stop"


def test_stop_over_three_tokens(client):
    tokens = tokens_as_bytes(client)
    stop = (tokens[1][-1:] + tokens[2] + tokens[3][:1]).decode()
    assert content_of(chat(client, stop=stop)) == content_of(chat(client)).split(stop)[0]


def test_no_part_of_a_stop_text_is_streamed(client):
    whole = text_of(complete(client))
    stop = whole[20:32]
    chunks = list(complete(client, stop=stop, stream=True))
    assert streamed_text(chunks) == whole.split(stop)[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_beginning_of_a_stop_text_is_part_of_the_answer(client):
    whole = text_of(complete(client))
    answer = complete(client, stop=whole[-6:] + " or not")
    assert (text_of(answer), answer.choices[0].finish_reason) == (whole, "length")
    chunks = list(complete(client, stop=whole[-6:] + " or not", stream=True))
    assert streamed_text(chunks) == whole, "what was held back comes at the end"


def test_stop_in_the_prompt_does_not_count(client):
    assert text_of(complete(client, stop="upon")) == text_of(complete(client)).split("upon")[0] != ""


# ---- streams

@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_streamed_completion_has_the_same_text(client, prompt):
    same = {"temperature": 0.8, "seed": 5, "max_tokens": 40}
    assert streamed_text(complete(client, prompt, stream=True, **same)) == text_of(complete(client, prompt, **same))


def test_a_streamed_chat_has_the_same_text(client):
    for seed in range(5):
        same = {"temperature": 1, "seed": seed}
        assert streamed_content(chat(client, stream=True, **same)) == content_of(chat(client, **same)), f"seed {seed}"


def test_a_stream_comes_in_pieces(client):
    chunks = [chunk for chunk in complete(client, max_tokens=40, stream=True) if chunk.choices and chunk.choices[0].text]
    assert len(chunks) > 5, f"40 tokens came in {len(chunks)} pieces"


def test_a_stream_has_usage_only_if_asked(client):
    assert all(chunk.usage is None for chunk in chat(client, stream=True))
    assert all(chunk.usage is None for chunk in chat(client, stream=True, stream_options={"include_usage": False}))


@pytest.mark.parametrize("ask", [chat, complete])
def test_include_usage(client, ask):
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and all(chunk.usage is None for chunk in chunks)
    whole = ask(client)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    check_experts(last.usage)


def test_token_ids_in_a_stream(client):
    extended = {"extra_body": {"return_token_ids": True}}
    chunks = list(complete(client, stream=True, **extended))
    ids = [token for chunk in chunks if chunk.choices for token in getattr(chunk.choices[0], "token_ids", None) or []]
    assert ids == complete(client, **extended).choices[0].token_ids


def test_no_token_ids_unless_asked(client):
    assert not hasattr(complete(client).choices[0], "token_ids")


def test_the_sdk_s_own_accumulator_of_streams(client):
    with client.chat.completions.stream(model=MODEL, messages=STORY, temperature=0) as stream:
        final = stream.get_final_completion()
    assert content_of(final) == content_of(chat(client))
    assert final.choices[0].finish_reason == "stop"


# ---- usage, timings

def check_experts(usage):
    experts = usage.x_experts
    assert experts["needed"] > 0
    assert experts["needed"] == experts["ram"] + experts["disk"] + experts["remote"] + experts["fetched"], experts
    assert (experts["remote"], experts["fetched"], experts["bytes_fetched"], experts["peers"]) == (0, 0, 0, []), "nobody else is there"


def check_accounts(answer):
    usage, timings = answer.usage, answer.timings
    cached = usage.prompt_tokens_details.cached_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= cached < usage.prompt_tokens, "the last token of a prompt is always computed"
    assert (timings["cache_n"], timings["prompt_n"]) == (cached, usage.prompt_tokens - cached)
    assert timings["predicted_n"] == usage.completion_tokens
    assert timings["prompt_ms"] > 0 and timings["predicted_ms"] > 0 and timings["queued_ms"] >= 0
    assert math.isclose(timings["prompt_per_second"], timings["prompt_n"] / timings["prompt_ms"] * 1000, rel_tol=0.01), timings
    rates = [count / timings["predicted_ms"] * 1000 for count in (timings["predicted_n"] - 1, timings["predicted_n"])]
    assert rates[0] * 0.99 <= timings["predicted_per_second"] <= rates[1] * 1.01, f"the first token may be counted or not: {timings}"
    check_experts(usage)


def test_usage_and_timings_of_a_chat(client):
    check_accounts(chat(client))


def test_usage_and_timings_of_a_completion(client):
    answer = complete(client)
    check_accounts(answer)
    assert answer.usage.completion_tokens == 24


def test_a_prompt_asked_again_changes_nothing_but_what_is_cached(client):
    prompt = "A prompt that no other test asks for, of some twenty tokens, so that its beginning can be kept."
    first, again = complete(client, prompt), complete(client, prompt)
    check_accounts(again)
    assert text_of(first) == text_of(again)
    assert first.usage.prompt_tokens == again.usage.prompt_tokens


def test_the_tokens_of_a_prompt_are_counted(client):
    one, two = complete(client, " the"), complete(client, " the the")
    assert (one.usage.prompt_tokens, two.usage.prompt_tokens) == (1, 2)


# ---- logprobs

def check_token(chosen, most, is_likeliest):
    """One token's logprob beside those of the likeliest."""
    top = [other.logprob for other in chosen.top_logprobs]
    assert len(top) == most
    assert chosen.logprob <= 0 and all(logprob <= 0 for logprob in top)
    assert top == sorted(top, reverse=True), "the likeliest first"
    assert sum(map(math.exp, top)) <= 1 + 1e-4
    assert len({tuple(other.bytes) for other in chosen.top_logprobs}) == most, "the same token twice"
    if is_likeliest:
        assert math.isclose(chosen.logprob, top[0], abs_tol=1e-6) and bytes(chosen.bytes) == bytes(chosen.top_logprobs[0].bytes)


def test_logprobs_of_a_chat(client):
    answer = chat(client, logprobs=True, top_logprobs=20)
    tokens = answer.choices[0].logprobs.content
    for token in tokens:
        check_token(token, 20, is_likeliest=True)
    assert b"".join(bytes(token.bytes) for token in tokens) == content_of(answer).encode()
    assert "".join(token.token for token in tokens) == content_of(answer)


def test_logprobs_without_others(client):
    for more in ({}, {"top_logprobs": 0}):
        tokens = chat(client, logprobs=True, **more).choices[0].logprobs.content
        assert tokens and all(token.top_logprobs == [] and token.logprob <= 0 for token in tokens)


def test_no_logprobs_unless_asked(client):
    assert chat(client).choices[0].logprobs is None
    assert complete(client).choices[0].logprobs is None


def test_logprobs_of_text_of_several_bytes_a_letter(client):
    messages = [{"role": "user", "content": "春"}, {"role": "assistant", "content": "春草"}, {"role": "user", "content": "春"}]
    answer = chat(client, messages, temperature=1, seed=1, logprobs=True, top_logprobs=2, max_tokens=30)
    assert b"".join(bytes(token.bytes) for token in answer.choices[0].logprobs.content).decode(errors="replace") == content_of(answer)


def test_logprobs_are_the_model_s_before_sampling(client):
    def first(**more):
        top = chat(client, logprobs=True, top_logprobs=10, max_tokens=1, **more).choices[0].logprobs.content[0].top_logprobs
        return [(other.token, other.logprob) for other in top]
    plain = first()
    assert first(temperature=2, seed=1, top_p=0.5) == plain
    assert first(temperature=0.1, seed=2, extra_body={"top_k": 3, "repetition_penalty": 1.5}) == plain


def test_logprobs_of_a_sampled_token_are_those_of_the_distribution(client):
    for seed in range(8):
        token = chat(client, temperature=1, seed=seed, logprobs=True, top_logprobs=20, max_tokens=1).choices[0].logprobs.content[0]
        among = {bytes(other.bytes): other.logprob for other in token.top_logprobs}
        logprob = among.get(bytes(token.bytes))
        if logprob is None:
            assert token.logprob <= min(among.values())
        else:
            assert logprob == token.logprob


def test_logprobs_in_a_streamed_chat(client):
    whole = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    chunks = list(chat(client, logprobs=True, top_logprobs=3, stream=True))
    parts = [part for chunk in chunks if chunk.choices and chunk.choices[0].logprobs for part in chunk.choices[0].logprobs.content]
    assert parts == whole


@pytest.mark.parametrize("most", [0, 1, 5])
def test_logprobs_of_a_completion(client, most):
    answer = complete(client, logprobs=most)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == text_of(answer)
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) == 24
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
    for at, (token, logprob) in enumerate(zip(logprobs.tokens, logprobs.token_logprobs)):
        assert logprobs.text_offset[at] == logprobs.text_offset[0] + len("".join(logprobs.tokens[:at]))
        if most:
            among = logprobs.top_logprobs[at]
            assert len(among) == most and sum(map(math.exp, among.values())) <= 1 + 1e-4
            assert math.isclose(among[token], max(among.values()), abs_tol=1e-6) and math.isclose(among[token], logprob, abs_tol=1e-6)


def test_logprobs_of_both_endpoints_are_the_same(client):
    of_chat = chat(client, logprobs=True).choices[0].logprobs.content
    of_completion = complete(client, f"USER: {STORY[0]['content']}\nASSISTANT:", logprobs=0).choices[0].logprobs.token_logprobs
    assert [token.logprob for token in of_chat] == of_completion[: len(of_chat)]


# ---- models

def test_models_list(client):
    models = client.models.list()
    assert models.object == "list" and len(models.data) == 1
    assert models.data[0].object == "model" and models.data[0].owned_by


def test_models_retrieve(tiny, client):
    whole = tiny.http.get("/api/models").json()[0]
    assert whole["name"] == MODEL and whole["loaded"] is True
    by_name = client.models.retrieve(MODEL)
    assert by_name == client.models.list().data[0]
    assert client.models.retrieve(whole["id"]) == by_name
    assert client.models.retrieve(whole["id"][:12]) == by_name


def test_a_model_by_its_id(tiny, client):
    whole = tiny.http.get("/api/models").json()[0]["id"]
    for name in (whole, whole[:12]):
        assert text_of(complete(client, model=name)) == text_of(complete(client))


def test_a_model_that_is_not_there(client):
    for ask in (lambda: client.models.retrieve("gpt-9"), lambda: chat(client, model="gpt-9"), lambda: complete(client, model="gpt-9")):
        with pytest.raises(openai.NotFoundError) as error:
            ask()
        assert (error.value.type, error.value.code) == ("not_found_error", "model_not_found")


# ---- what is refused, and what is not

CODES = {None, "unsupported_parameter", "unsupported_value", "unknown_parameter"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
REFUSED = [
    ("tools", [TOOL]),
    ("tool_choice", "required"),
    ("n", 2),
    ("n", 0),
    ("logit_bias", {"50": 10}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -0.5),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("store", True),
    ("service_tier", "flex"),
    ("functions", [{"name": "f", "parameters": {}}]),
    ("reasoning_effort", "low"),
    ("prediction", {"type": "content", "content": "x"}),
    ("web_search_options", {}),
    ("temperature", 2.5),
    ("temperature", -1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_logprobs", 21),
    ("max_tokens", -1),
    ("max_completion_tokens", 1.5),
    ("seed", 1.5),
    ("seed", "seven"),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", 7),
    ("stream", "yes"),
    ("messages", []),
    ("messages", "hello"),
    ("model", 7),
]


@pytest.mark.parametrize("field, value", REFUSED, ids=lambda what: json.dumps(what)[:40])
def test_a_chat_with_another_value_is_refused_by_name(client, field, value):
    more = {"logprobs": True} if field == "top_logprobs" else {}
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, extra_body={**more, field: value})
    assert (error.value.type, error.value.param) == ("invalid_request_error", field)
    assert error.value.code in CODES
    assert field in error.value.body["message"]


@pytest.mark.parametrize("field", ["frobnicate", "Temperature", "max_length", "top_a", "prompt"])
def test_an_unknown_field_is_refused_by_name(client, field):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, extra_body={field: 1})
    assert (error.value.type, error.value.param, error.value.code) == ("invalid_request_error", field, "unknown_parameter")


@pytest.mark.parametrize(
    "field, value",
    [("logprobs", 6), ("logprobs", -1), ("echo", True), ("best_of", 2), ("suffix", "x"), ("n", 2), ("messages", STORY), ("prompt", ["a", "b"]),
     ("prompt", []), ("prompt", [8192]), ("prompt", [-1]), ("prompt", {"text": "a"}), ("stop", ["a"] * 5)],
    ids=lambda what: json.dumps(what)[:40],
)
def test_a_completion_with_another_value_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, extra_body={field: value})
    assert (error.value.type, error.value.param) == ("invalid_request_error", field)
    assert error.value.code in CODES


PICTURE = "data:image/png;base64,iVBORw0KGgo="
PARTS = [
    {"type": "image_url", "image_url": {"url": PICTURE}},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/picture.png"}},
    {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
    {"type": "file", "file": {"file_data": "QQ==", "filename": "a.pdf"}},
    {"type": "text"},
    {"type": "text", "text": 7},
    "text",
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: json.dumps(part)[:40])
def test_other_parts_are_refused(client, part):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}])
    assert error.value.param.startswith("messages"), error.value.param


def test_no_picture_is_fetched(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        part = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"}}
        with pytest.raises(openai.BadRequestError):
            chat(client, [{"role": "user", "content": [part]}])
        with pytest.raises(TimeoutError):
            listener.accept()


MESSAGES = [
    {"role": "tool", "content": "1", "tool_call_id": "a"}, {"role": "wizard", "content": "a"}, {"content": "a"}, {"role": "user"},
    {"role": "user", "content": 7}, "hello",
]


@pytest.mark.parametrize("message", MESSAGES, ids=json.dumps)
def test_other_messages_are_refused(client, message):
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, [message])
    assert error.value.param.startswith("messages"), error.value.param


def test_a_missing_field_is_named(tiny):
    chats, texts = "/v1/chat/completions", "/v1/completions"
    for path, body, field in [(chats, {"messages": STORY}, "model"), (chats, {"model": MODEL}, "messages"), (texts, {"model": MODEL}, "prompt")]:
        answer = tiny.http.post(path, json=body)
        check_error(answer, 400, "invalid_request_error", {None})
        assert answer.json()["error"]["param"] == field


def test_fields_that_say_nothing_new_are_accepted(client):
    idle = {
        "n": 1, "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "modalities": ["text"], "store": False, "user": "someone", "safety_identifier": "s", "prompt_cache_key": "k",
        "metadata": {"a": "b"}, "parallel_tool_calls": True, "service_tier": "auto",
    }
    assert content_of(chat(client, extra_body=idle)) == content_of(chat(client))
    assert content_of(chat(client, service_tier="default", tool_choice="auto")) == content_of(chat(client))


def test_null_is_as_if_it_were_left_out(client):
    nothing = dict.fromkeys(["stop", "seed", "max_tokens", "top_p", "stream", "n", "logprobs", "tools", "user", "stream_options", "metadata"])
    assert content_of(chat(client, extra_body=nothing)) == content_of(chat(client))


def test_an_answer_goes_back_in_as_the_sdk_serialises_it(client):
    question = {"role": "user", "content": "Hello"}
    answer = chat(client, [question], logprobs=True).choices[0].message
    for echoed in (answer.model_dump(), answer.model_dump(exclude_none=True), {**answer.model_dump(), "content": None}):
        assert chat(client, [question, echoed, question]).choices


@pytest.mark.parametrize("ask", [lambda client, text: chat(client, [{"role": "user", "content": text}]), complete], ids=["chat", "completions"])
def test_a_prompt_that_is_too_long(client, ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "A word. " * CONTEXT)
    assert (error.value.type, error.value.code) == ("invalid_request_error", "context_length_exceeded")
    assert str(CONTEXT) in error.value.body["message"], error.value.body["message"]


@pytest.mark.parametrize("body", ["", "{", "[1", '{"model": "tiny",}', "\x00", '{"model": NaN}'])
def test_what_is_no_json(tiny, body):
    answer = tiny.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    check_error(answer, 400, "invalid_request_error", {"invalid_json"})


def test_errors_of_http(tiny):
    invalid = "invalid_request_error"
    check_error(tiny.http.get("/v1/chat/completions"), 405, invalid, {None})
    check_error(tiny.http.delete("/v1/models"), 405, invalid, {None})
    check_error(tiny.http.post("/v1/completions", content="a=b", headers={"content-type": "application/x-www-form-urlencoded"}), 415, invalid, {None})
    check_error(tiny.http.post("/v1/completions", content=b" " * (2**20 + 1), headers={"content-type": "application/json"}), 413, invalid, {None})
    for path in ("/v1/nothing", "/nothing", "/api/nothing", "/v1/models/nothing/more"):
        check_error(tiny.http.get(path), 404, "not_found_error", {"not_found"})


def test_an_error_before_a_stream_is_no_stream(tiny):
    body = {"model": "gpt-9", "messages": STORY, "stream": True}
    check_error(tiny.http.post("/v1/chat/completions", json=body), 404, "not_found_error", {"model_not_found"})


# ---- on the wire

def events_of(serving, path, body):
    """The lines of a stream's events, after a look at how they are set."""
    with serving.http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].split(";")[0] == "text/event-stream"
        raw = answer.read().decode()
    assert raw.endswith("\n\n")
    events = [event for event in raw[:-2].split("\n\n") if not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events), events
    assert events[-1] == "data: [DONE]"
    return [json.loads(event[6:]) for event in events[:-1]]


def check_chunks(chunks, kind):
    """What is the same for chats and completions; the choices of all chunks but the one with usage."""
    for name in ("id", "created", "model"):
        assert chunks[0][name] and len({chunk[name] for chunk in chunks}) == 1, name
    assert all(chunk["object"] == kind for chunk in chunks)
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0
    assert all(len(chunk["choices"]) == 1 and chunk["choices"][0]["index"] == 0 for chunk in chunks)
    assert all(chunk.get("usage") is None for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return choices


def test_a_streamed_chat_on_the_wire(tiny):
    body = {"model": MODEL, "messages": STORY, "stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    choices = check_chunks(events_of(tiny, "/v1/chat/completions", body), "chat.completion.chunk")
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert not choices[-1]["delta"].get("content"), "the last has no text"


def test_a_streamed_completion_on_the_wire(tiny):
    body = {"model": MODEL, "prompt": PROMPT, "stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
    choices = check_chunks(events_of(tiny, "/v1/completions", body), "text_completion")
    assert "".join(choice["text"] for choice in choices)
    assert choices[-1]["text"] == "", "the last has no text"


def test_no_stream_splits_a_letter(tiny):
    for seed in range(4):
        body = {"model": MODEL, "prompt": "春眠不覺曉,處處聞啼", "stream": True, "temperature": 1, "seed": seed, "max_tokens": 60}
        with tiny.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        texts = [choice["text"] for line in lines for choice in json.loads(line)["choices"]]
        whole = tiny.http.post("/v1/completions", json={**body, "stream": False}).json()["choices"][0]["text"]
        assert "".join(texts) == whole
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)[:-1]


# ---- many at once

@pytest.mark.parametrize("temperature", [0, 1])
def test_eight_at_once_have_the_texts_of_each_alone(tiny, temperature):
    asked = [{"prompt": prompt, "temperature": temperature, "seed": 9, "max_tokens": 60 + 10 * at} for at, prompt in enumerate(PROMPTS)]
    with strict(tiny) as client:
        alone = [text_of(complete(client, **one)) for one in asked]

    async def ask():
        async with strict(tiny, openai.AsyncOpenAI) as client:
            return [text_of(answer) for answer in await asyncio.gather(*(complete(client, **one) for one in asked))]
    for _ in range(3):
        assert asyncio.run(ask()) == alone


def long_stream(client, **more):
    return lenient(client).completions.create(**{"model": "long", "prompt": PROMPT, "temperature": 0, "max_tokens": 8_000, "stream": True, **more})


def freed_within(serving, leave):
    """Seconds from `leave`, which drops the only request under way, until its place is free; then nothing more may be computed."""
    wait_for(lambda: serving.generation()["active"] == 1, "the request is not under way", 60)
    leave()
    left = time.monotonic()
    while serving.generation()["active"]:
        assert time.monotonic() < left + 20, "the place of a client that went away is not freed"
    took = time.monotonic() - left
    tokens = serving.generation()["tokens"]
    time.sleep(0.3)
    assert serving.generation()["tokens"] == tokens, "tokens are generated for nobody"
    return took


def in_ms(took):
    return f"median {statistics.median(took) * 1000:.0f} ms ({FREED_WITHIN * 1000:.0f} allowed), {max(took) * 1000:.0f} ms at most, of {len(took)}"


def test_a_client_that_drops_its_stream_frees_its_place(long, figure):
    took = []
    with strict(long) as client:
        for _ in range(9):
            stream = long_stream(client)
            next(iter(stream))
            took.append(freed_within(long, stream.close))
    figure(f"place freed after a stream was dropped: {in_ms(took)}")
    assert statistics.median(took) <= FREED_WITHIN


def give_up(serving, gone):
    """Waits a second for an answer that takes longer, and hangs up."""
    body = {"model": "long", "prompt": PROMPT, "temperature": 0, "max_tokens": 8_000}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{serving.url}/v1/completions", json=body, timeout=1, trust_env=False)
        return
    gone.set()


def test_a_client_that_gives_up_waiting_frees_its_place(long, figure):
    took = []
    for _ in range(9):
        gone = threading.Event()
        threading.Thread(target=give_up, args=(long, gone)).start()
        took.append(freed_within(long, lambda gone=gone: gone.wait(60)))
        assert gone.is_set(), "it was answered before it could give up"
    figure(f"place freed after a client gave up waiting: {in_ms(took)}")
    assert statistics.median(took) <= FREED_WITHIN


def test_a_full_queue_refuses_one_user_and_not_another(long):
    """One user has 16 waiting at most, beside what is under way; another is answered all the same."""
    async def ask(http, user, **more):
        body = {"model": "long", "prompt": PROMPT, "temperature": 0, "max_tokens": 500, "user": user, **more}
        return await http.post("/v1/completions", json=body)

    async def flood():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=long.url, timeout=300, trust_env=False, limits=limits) as http:
            many = [asyncio.create_task(ask(http, "many")) for _ in range(60)]
            await asyncio.sleep(0.5)
            one = await ask(http, "one", max_tokens=1)
            return await asyncio.gather(*many), one
    many, one = asyncio.run(flood())
    refused = [answer for answer in many if answer.status_code != 200]
    assert one.status_code == 200, one.text
    assert 0 < len(refused) <= 60 - 16, f"{len(refused)} of 60 refused"
    for answer in refused:
        check_error(answer, 429, "rate_limit_error", {"queue_full"})
        assert int(answer.headers["retry-after"]) >= 0
    assert len({answer.json()["choices"][0]["text"] for answer in many if answer.status_code == 200}) == 1


def test_the_sdk_tries_again_when_the_queue_was_full(long):
    async def flood():
        async with strict(long, openai.AsyncOpenAI) as at_once, strict(long, openai.AsyncOpenAI, max_retries=20) as patient:
            ask = {"model": "long", "prompt": PROMPT, "temperature": 0, "max_tokens": 300}
            clients = [at_once] * 48 + [patient] * 12
            return await asyncio.gather(*(client.completions.create(**ask) for client in clients), return_exceptions=True)
    answers = asyncio.run(flood())
    errors = [answer for answer in answers if isinstance(answer, Exception)]
    assert errors and all(isinstance(error, openai.RateLimitError) and error.code == "queue_full" for error in errors), errors[:1]
    assert not any(isinstance(answer, Exception) for answer in answers[48:]), "those who try again are answered"
