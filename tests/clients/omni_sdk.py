"""Pictures and sounds through the openai package: content parts, transcriptions, what a model takes in."""
import base64

import openai
import pytest

import nodes
from conftest import strict


@pytest.fixture(scope="module")
def omni():
    with nodes.serving_with("omni") as serving:
        yield serving


@pytest.fixture
def client(omni):
    with strict(omni) as client:
        yield client


def encoded(name):
    return base64.b64encode((nodes.MEDIA / name).read_bytes()).decode()


def image(name="c_64x64.png", kind="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded(name)}"}}


def sound(name="exact.wav", kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": encoded(name), "format": kind}}


def ask(client, *parts, **more):
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return client.chat.completions.create(model="omni", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=12, **more)


def test_a_picture_and_a_sound_are_answered_and_counted(client):
    answer = ask(client, image(), sound())
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens_details.audio_tokens == 26
    assert answer.usage.prompt_tokens_details.x_vision_tokens == 4
    assert answer.usage.prompt_tokens > 30


def test_formats_make_no_difference(client):
    same = {ask(client, image(name, kind)).choices[0].message.content for name, kind in [("c_64x64.png", "image/png"), ("c.webp", "image/webp"), ("c.bmp", "image/bmp")]}
    assert len(same) == 1
    same = {ask(client, sound(name, kind)).choices[0].message.content for name, kind in [("short.wav", "wav"), ("short.flac", "flac")]}
    assert len(same) == 1


def test_a_stream_says_the_same(client):
    whole = ask(client, image(), sound()).choices[0].message.content
    chunks = ask(client, image(), sound(), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def test_a_model_says_what_it_takes_in(client):
    model = client.models.retrieve("omni")
    assert model.modalities == {"input": ["text", "image", "video", "audio"], "output": ["text"]}


@pytest.mark.parametrize("name", ["short.wav", "short.mp3", "short.ogg", "short.flac"])
def test_a_sound_is_written_down(client, name):
    with (nodes.MEDIA / name).open("rb") as file:
        answer = client.audio.transcriptions.create(model="omni", file=file, response_format="json")
    assert isinstance(answer.text, str)


def test_a_transcription_as_text(client):
    with (nodes.MEDIA / "short.wav").open("rb") as file:
        assert isinstance(client.audio.transcriptions.create(model="omni", file=file, response_format="text", language="en"), str)


def test_a_transcription_with_its_length(client):
    with (nodes.MEDIA / "exact.wav").open("rb") as file:
        answer = client.audio.transcriptions.create(model="omni", file=file, response_format="verbose_json")
    assert answer.duration == 2.0


def test_what_is_no_sound_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="no sound that is read"):
        client.audio.transcriptions.create(model="omni", file=("a.wav", b"hello"))
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.audio.transcriptions.create(model="omni", file=("a.wav", b"hello"), response_format="srt")
    with pytest.raises(openai.BadRequestError, match="nothing is fetched"):
        ask(client, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})


def test_a_model_of_text_takes_no_picture():
    with nodes.serving_with("tiny") as serving, strict(serving) as client:
        content = [image(), {"type": "text", "text": "What is it?"}]
        with pytest.raises(openai.BadRequestError, match="takes no image"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
