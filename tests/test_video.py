"""Frames by time, whatever the encoder."""

import av
import numpy as np
import pytest

from clp_jax.data.video import OpenFiles, VideoFrames
from clp_jax.errors import InputError
from scripts.make_lerobot_toy import FPS, pictures

FRAMES = pictures(40, (96, 128), 0)
CODECS = {"libx264": {"g": "12", "bf": "3"}, "libsvtav1": {"g": "10"}}  # lerobot writes AV1 by default


@pytest.mark.parametrize("codec", CODECS)
def test_any_frame_is_found_in_any_order(tmp_path, codec):
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=CODECS[codec])
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for picture in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "x.mp4")) as container:
        in_order = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(in_order) == len(FRAMES)
    video = VideoFrames()
    for row in np.random.default_rng(0).permutation(len(FRAMES)):
        found = video.frame(tmp_path / "x.mp4", row / FPS, tolerance=1e-3)
        np.testing.assert_array_equal(found, in_order[row])


def test_few_files_stay_open_and_a_failed_one_does_not(tmp_path):
    class File:
        closed = False

        def close(self):
            self.closed = True

    opened: list[File] = []
    files = OpenFiles(lambda path: opened.append(File()) or opened[-1], limit=2)
    for name in "abca":
        with files.borrow(tmp_path / name):
            pass
    assert [file.closed for file in opened] == [True, True, False, False]  # a, then b made room
    with pytest.raises(ValueError, match="broken"), files.borrow(tmp_path / "a"):
        raise ValueError("broken")
    assert opened[3].closed


def test_a_damaged_picture_is_refused_and_not_concealed(tmp_path):
    """FFmpeg fills what it cannot read with guesses from other pictures."""
    file, rng = tmp_path / "x.mp4", np.random.default_rng(0)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        for picture in rng.integers(0, 256, (20, 96, 128, 3)).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)
    refused = []
    for row in range(20):
        try:
            VideoFrames().frame(file, row / FPS, tolerance=1e-3)
        except InputError as error:
            refused.append((row, str(error)))
    assert 0 < len(refused) <= 4
    assert all(8 <= row <= 12 and "damaged there" in text for row, text in refused)
