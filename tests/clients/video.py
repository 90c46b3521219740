"""Videos that `ffmpeg` reads: the tokens are those of the same frames as pictures, and a file that names others is refused."""
import json
import shutil
import subprocess

import imageio_ffmpeg
import nodes
import pytest

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture(scope="module")
def node():
    with nodes.node_with("omni") as node:
        yield node


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Five frames as pictures, and the same as videos whose frames are bit for bit those pictures."""
    scratch = tmp_path_factory.mktemp("video")
    (scratch / "frames").mkdir()
    for number in range(5):
        shutil.copy(nodes.MEDIA / f"video_{number}.png", scratch / "frames")
    frames = ["-framerate", "2", "-i", str(scratch / "frames/video_%d.png")]
    sound = ["-i", str(nodes.MEDIA / "track.wav")]
    make(*frames, "-c:v", "ffv1", "-pix_fmt", "bgr0", scratch / "silent.mkv")
    make(*frames, *sound, "-c:v", "png", "-c:a", "pcm_s16le", scratch / "sound.mov")
    make(*frames, "-c:v", "mpeg4", scratch / "lossy.mp4")
    (scratch / "bin").mkdir()
    (scratch / "bin/ffmpeg").symlink_to(FFMPEG)
    return scratch


def make(*args):
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, args)], check=True)


def ask(node, scratch, *media, code=0, with_ffmpeg=True):
    path = f"{scratch / 'bin'}:/nowhere" if with_ffmpeg else "/nowhere"
    command = [nodes.BINARY, "--data-dir", node.directory, "--json", "--offline", "run", "omni", "What is it?", "--max-tokens", "8", "--temperature", "0", *map(str, media)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**nodes.clean_environment(), "PATH": path})
    assert ended.returncode == code, ended.stderr
    return json.loads(ended.stdout) if code == 0 else ended.stderr


def test_frames_are_those_of_the_pictures(node, scratch):
    expected = ask(node, scratch, "--video", scratch / "frames")
    for name in ["silent.mkv", "sound.mov"]:
        answer = ask(node, scratch, "--video", scratch / name)
        assert (answer["tokens"], answer["media"][0]["tokens"]) == (expected["tokens"], expected["media"][0]["tokens"]), name


def test_its_own_sound_is_heard(node, scratch):
    silent = ask(node, scratch, "--video", scratch / "sound.mov")
    heard = ask(node, scratch, "--video", scratch / "sound.mov", "--video-sound")
    assert heard["media"][0]["tokens"] > silent["media"][0]["tokens"]
    assert heard["experts"]["by_modality"]["audio"]["tokens"] > 0


def test_what_people_have_is_read(node, scratch):
    assert ask(node, scratch, "--video", scratch / "lossy.mp4", "--fps", "1")["tokens"]


def test_no_frame_is_left_out_unsaid(node, scratch):
    assert ask(node, scratch, "--video", scratch / "silent.mkv", "--media-frames", "5")["tokens"]
    assert "frames" in ask(node, scratch, "--video", scratch / "silent.mkv", "--media-frames", "4", code=2)


def test_without_ffmpeg_the_error_says_so(node, scratch):
    assert "ffmpeg" in ask(node, scratch, "--video", scratch / "lossy.mp4", code=2, with_ffmpeg=False)


@pytest.mark.parametrize("text", [
    "#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXTINF:1,\nconcat:{secret}|{secret}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile {secret}\n",
])
def test_a_file_that_names_others_is_refused(node, scratch, text):
    secret = scratch / "silent.mkv"
    list_of_files = scratch / "list.mp4"
    list_of_files.write_text(text.format(secret=secret))
    assert "ffmpeg" in ask(node, scratch, "--video", list_of_files, code=2)


def test_what_is_damaged_is_refused(node, scratch):
    bytes_of_it = (scratch / "lossy.mp4").read_bytes()
    cut = scratch / "cut.mp4"
    cut.write_bytes(bytes_of_it[: len(bytes_of_it) // 4])
    assert "cut.mp4" in ask(node, scratch, "--video", cut, code=2)
