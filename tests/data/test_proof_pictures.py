"""Videos and pictures are proven before training, without decoding them."""

import struct
import zlib

import av
import lerobot_sets as sets
import numpy as np
import pytest
from lerobot_sets import STILL, VIDEO, encoded, proven
from PIL import Image

from clp_jax.data import pictures
from clp_jax.data.lerobot import LeRobotData
from clp_jax.data.lerobot_meta import read_meta
from clp_jax.data.proof.stills import check_stills
from clp_jax.data.video import VideoFrames, frame_tolerance, read_film
from clp_jax.errors import InputError
from scripts.make_lerobot_toy import FPS
from scripts.make_lerobot_toy import pictures as gradients

PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module", params=sets.VERSIONS)
def sound(request, tmp_path_factory):
    return sets.make(tmp_path_factory.mktemp("sound") / "set", request.param)


@pytest.fixture
def folder(sound, tmp_path):
    return sets.copied(sound, tmp_path / "set")


def last_video(folder):
    """Of episode 2, alone in its file, in either version."""
    return max(folder.glob("videos/**/*.mp4"))


def film_of(frames):
    return lambda folder: sets.write_video(last_video(folder), gradients(frames, (48, 64), 0))


def cut(folder):
    file = last_video(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(folder):
    last_video(folder).write_bytes(b"")


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(_):
    """The head of a PNG of 900 million pixels."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def flipped(content):
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def still(change):
    return sets.pictures(STILL, change)


DAMAGE = {
    "episode 2, frame 8, observation.video: .* has no frame at 0.800 s, which the table asks for; it has 8": film_of(8),
    "episode 2, frame 4, .* has no frame at 0.400 s, which the table asks for, nor for 4 more of its 9": film_of(4),
    "episode 2, observation.video: the video .* cannot be decoded": cut,
    "episode 2, observation.video: the video .*cannot be decoded: .*Invalid data": emptied,
    "episode 2, frame 4, observation.still: .* a picture of 16 bits a value": still(
        lambda _: encoded(np.full((48, 64), 3000, np.uint16))
    ),
    "observation.still: .* a broken image: a check sum of the PNG is wrong": still(flipped),
    "observation.still: .* a broken image: it is cut off": still(lambda content: content[: len(content) // 2]),
    "frame 4, observation.still: .* a broken image: the JPEG has no end": still(
        lambda _: encoded(PICTURE, "JPEG")[:-200]
    ),
    "observation.still: .* a broken image: it is of no format": still(lambda _: b"no picture"),
    "observation.still: .* a broken image: .* no format|cut off": still(lambda _: b""),
    "observation.still: .* a picture of 30000x30000 pixels, more than": still(bomb),
    "episode 2, frame 4, observation.still: .* holds no image bytes": still(lambda _: None),
    "episode 2, frame 0, observation.still: [^ ]* has no column observation.still; it has": lambda f: sets.edit_table(
        sets.last_table(f), lambda t: t.drop_columns([STILL])
    ),
    "observation.still: [^ ]* holds no image bytes, but int64": lambda f: sets.edit_table(
        sets.last_table(f), lambda t: sets.with_column(t, STILL, t.column("index"))
    ),
    "observation.still: .* a picture of 32 bits|16 bits": still(
        lambda _: encoded(np.zeros((4, 4), np.float32), "TIFF")
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_pictures_are_refused(folder, message):
    DAMAGE[message](folder)
    with pytest.raises(InputError, match=message) as caught:
        proven(folder)
    assert "\n" not in str(caught.value)


def test_pictures_that_nobody_reads_are_not_asked_about(folder):
    emptied(folder)
    still(lambda _: b"no picture")(folder)
    assert proven(folder, cameras=()).notes == ()


def test_episodes_that_claim_the_same_frames_are_refused(tmp_path):
    folder = sets.make(tmp_path / "set", "v3.0")
    sets.edit_episodes(folder, lambda e: [e[0], e[1] | {f"videos/{VIDEO}/from_timestamp": 0.2}, e[2]])
    with pytest.raises(InputError, match=r"episodes 0 and 1 claim the same frames of .*, from 0.200 to 0.500 s"):
        proven(folder)


def test_rows_of_an_episode_that_claim_the_same_frame_are_refused(tmp_path):
    """As a large tolerance lets them: rows 3 and 4 are both nearest to the frame at 0.3 s."""
    folder = sets.make(tmp_path / "set", "v2.1")
    sets.counter("timestamp", lambda _: np.float32([0, 0.1, 0.2, 0.265, 0.335, 0.4, 0.5, 0.6, 0.7]))(folder)
    with pytest.raises(InputError, match="rows of episode 2 claim the same frame of the video"):
        proven(folder, cameras=(VIDEO,), tolerance=0.04)


@pytest.mark.parametrize(("start", "message"), [(9.0, "has no frame at 9.000 s"), (0.72, "has no frame at 0.720 s")])
def test_a_span_beyond_or_between_the_frames_is_refused(tmp_path, start, message):
    folder = sets.make(tmp_path / "set", "v3.0")
    sets.edit_episodes(folder, lambda e: [e[0], e[1] | {f"videos/{VIDEO}/from_timestamp": start}, e[2]])
    with pytest.raises(InputError, match=message):
        proven(folder)


@pytest.mark.parametrize("start", [None, float("nan"), -1.0])
def test_a_span_without_a_beginning_is_refused(tmp_path, start):
    folder = sets.make(tmp_path / "set", "v3.0")
    sets.edit_episodes(folder, lambda e: [e[0], e[1] | {f"videos/{VIDEO}/from_timestamp": start}, e[2]])
    with pytest.raises(InputError, match=r"at no time of its video|not as LeRobot v3.0 writes it"):
        proven(folder)


def test_frames_of_no_row_are_said(folder):
    film_of(12)(folder)
    assert proven(folder).notes == ("observation.video: 3 frames of the videos belong to no row.",)


def test_another_size_than_declared_is_said(folder):
    for key in (VIDEO, STILL):
        sets.edit_feature(folder, key, shape=[480, 640, 3])
    notes = proven(folder).notes
    assert len(notes) == 2
    for key, note in zip((VIDEO, STILL), notes, strict=True):
        assert f"pictures of {key} are 48x64, info.json says 480x640" in note


@pytest.mark.parametrize("shape", [[3, 48, 64], [48, 64, 3], None, 7, "large"])
def test_declared_sizes_of_either_order_and_none_at_all_pass(folder, shape):
    for key in (VIDEO, STILL):
        sets.edit_feature(folder, key, shape=shape)
    assert proven(folder).notes == ()


FILMS = {
    "every frame a key": ("libx264", {"g": "1"}),
    "frames shown in another order": ("libx264", {"g": "12", "bf": "3"}),
    "AV1": ("libsvtav1", {"g": "10"}),
    "MPEG-4": ("mpeg4", {}),
}


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_times_of_frames_are_those_of_the_decoded_ones(tmp_path, name, kind):
    file = tmp_path / f"film.{kind}"
    codec, options = FILMS[name]
    sets.write_video(file, gradients(23, (48, 64), 0), codec=codec, options=options)
    with av.open(str(file)) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    film = read_film(file)
    np.testing.assert_allclose(film.times, shown, atol=1e-6)
    assert (film.height, film.width) == (48, 64)


def test_uneven_times_are_those_of_the_decoded_frames(tmp_path):
    file, ticks = tmp_path / "film.mp4", [0, 1, 2, 5, 6, 9, 10, 11]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for tick, picture in zip(ticks, gradients(8, (48, 64), 0), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(file)) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(read_film(file).times, shown, atol=1e-6)


def test_at_a_thousand_frames_a_second_the_own_frame_is_read(tmp_path):
    """A fixed tolerance of a millisecond would take the frame before."""
    file, frames = tmp_path / "film.mp4", gradients(20, (48, 64), 0)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"g": "1", "qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    video = VideoFrames()
    for row in range(20):
        found = video.frame(file, row / 1000, tolerance=frame_tolerance(1000.0)).astype(int)
        assert np.abs(found - frames.astype(int)).mean(axis=(1, 2, 3)).argmin() == row


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    with pytest.raises(InputError, match="give a number above 0"):
        frame_tolerance(30.0, tolerance)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7), (5, 7, 4)])
def test_sound_pictures_of_8_bits_pass(kind, shape):
    if kind == "JPEG" and shape[-1] == 4:
        return  # JPEG has no transparency
    content = encoded(np.zeros(shape, np.uint8), kind)
    assert pictures.verify(content) == pictures.Picture(5, 7, 8)
    assert pictures.decode(content).shape == (5, 7, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow also warns of a TIFF that is cut off
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_any_cut_of_a_picture_is_one_line(kind):
    content = encoded(PICTURE, kind)
    for length in {*range(0, 200, 7), *range(200, len(content) - 3, 331)}:
        for read in (pictures.verify, pictures.decode):
            try:
                read(content[:length])
                refused = False
            except InputError:
                refused = True
            assert refused or kind not in ("PNG", "JPEG") or read is pictures.decode


def test_pictures_beyond_the_limit_are_sampled_and_it_is_said(folder):
    data = LeRobotData(read_meta(folder, (STILL,)))
    data.read(["timestamp"])
    rows = data.rows("timestamp")
    everything = check_stills(data, rows, STILL, most_bytes=None)
    assert (everything.findings, everything.amount.split()[0]) == ((), "20")
    part = check_stills(data, rows, STILL, most_bytes=1)
    assert part.digest is not None
    assert all("pictures were proven" in finding.text and not finding.fatal for finding in part.findings)


def test_pillows_limit_is_kept(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="more than the 10 that Pillow takes for safe"):
        pictures.verify(encoded(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(InputError, match=r"a picture of 4x4 pixels|a picture that is too large"):
        pictures.decode(encoded(np.zeros((4, 4, 3), np.uint8)))
