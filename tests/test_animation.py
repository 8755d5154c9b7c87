"""tools.animation: the films of runs, side by side."""

import os

import numpy as np
import pytest
from moviepy import ImageSequenceClip
from PIL import Image

from tools import animation

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def film(run_dir, colors, name="film", width=64):
    """A film at 10 frames a second, each frame of one color and 32 pixels high."""
    (run_dir / "video").mkdir(parents=True, exist_ok=True)
    frames = [np.full((32, width, 3), color, np.uint8) for color in colors]
    path = run_dir / "video" / f"{name}.mp4"
    ImageSequenceClip(frames, fps=10).write_videofile(str(path), logger=None)
    return path


def colors(picture, x):
    """The color at x, as 200 or 0, in each tenth of a second."""
    found = []
    for i in range(picture.n_frames):
        picture.seek(i)
        pixel = np.array(picture.convert("RGB").getpixel((x, 8)))
        found += [tuple((pixel > 100) * 200)] * round(picture.info["duration"] / 100)
    return found


@pytest.mark.slow
def test_films_are_side_by_side_and_a_short_one_begins_again(tmp_path, capsys):
    old = film(tmp_path / "a", [BLUE] * 10, "old")
    os.utime(old, (1, 1))
    film(tmp_path / "a", [RED] * 10 + [GREEN] * 10 + [BLUE] * 10)
    film(tmp_path / "b", [GREEN] * 5 + [BLUE] * 6, width=32)  # moviepy drops the last frame
    output = tmp_path / "both.webp"
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    animation.main(animation.Args(runs, str(output), height=16, seconds=2.0, fps=10))
    picture = Image.open(output)
    assert picture.size == (32 + 6 + 16, 16)
    assert colors(picture, 16) == [RED] * 10 + [GREEN] * 10
    assert colors(picture, 46) == ([GREEN] * 5 + [BLUE] * 5) * 2
    assert picture.info["loop"] == 0  # for ever
    assert "20 frames of 54 × 16" in capsys.readouterr().out


def test_a_picture_that_cannot_be_encoded_costs_no_older_one(tmp_path, capsys, monkeypatch):
    """As one that is too wide for its format; Pillow's errors are of many types."""

    def save(picture, file, *args, **options):
        file.write(b"half")
        raise ValueError("too wide")

    monkeypatch.setattr(animation, "read_frames", lambda *_: [Image.new("RGB", (8, 8))])
    monkeypatch.setattr(animation, "newest_film", lambda run_dir: run_dir)
    monkeypatch.setattr(Image.Image, "save", save)
    output = tmp_path / "both.gif"
    output.write_bytes(b"older")
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args(["a"], str(output)))
    assert stop.value.code == 1
    assert "both.gif: too wide" in capsys.readouterr().err
    assert output.read_bytes() == b"older"


def test_a_run_without_a_film(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args([str(tmp_path)]))
    assert stop.value.code == 2
    assert f"python -m tools.evaluate {tmp_path} --mode --video" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        dict(run_dirs=[]),
        dict(fps=0),
        dict(height=0),
        dict(seconds=0.01),
        dict(seconds=float("inf")),
        dict(seconds=float("nan")),
    ],
)
def test_no_frame_is_said(options, capsys):
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args(**dict(run_dirs=["x"]) | options))
    assert stop.value.code == 2
    assert "at least one frame" in capsys.readouterr().err


@pytest.mark.parametrize("quality", [-1, 101])
def test_an_impossible_quality_is_said_first(quality, capsys):
    with pytest.raises(SystemExit, match="2"):
        animation.main(animation.Args(["x"], quality=quality))
    assert f"--quality must be from 0 to 100, not {quality}" in capsys.readouterr().err


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch, capsys):
    def full(*_, **options):
        raise OSError("No space left")

    monkeypatch.setattr(animation, "newest_film", str)
    monkeypatch.setattr(animation, "read_frames", lambda *_: [Image.new("RGB", (8, 8))])
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit, match="1"):
        animation.main(animation.Args(["x"], str(tmp_path / "a.webp")))
    assert "a.webp: No space left" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["learned.mp4", "l.jpg", "learned"])
def test_a_format_without_motion_is_said_first(name, tmp_path, capsys):
    path = tmp_path / name
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args(["x"], str(path)))
    assert stop.value.code == 2
    said = f"error: {path} cannot be a moving picture: give a name in .webp or .gif\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["a.webp", "a.GIF", "a.png"])
def test_formats_with_motion(name, tmp_path):
    animation.refuse_output(str(tmp_path / name))


def test_a_folder_in_place_of_the_file_is_said_first(tmp_path, capsys):
    folder = tmp_path / "folder.gif"
    folder.mkdir()
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args(["x"], str(folder)))
    assert stop.value.code == 2
    assert f"{folder} is a folder: name a file to write" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5])
def test_a_film_that_is_cut_off_is_said(kept, tmp_path, capsys):
    path = film(tmp_path, [RED] * 10 + [GREEN] * 10)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args([str(tmp_path)], str(tmp_path / "x.webp"), fps=10))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: {path} is not a whole film: make it again\n"


def test_a_missing_folder_is_said_first(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        animation.main(animation.Args(["x"], str(tmp_path / "nowhere" / "x.webp")))
    assert stop.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
