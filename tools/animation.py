"""Put the films of several runs side by side, in one moving picture for a page.

Run: python -m tools.evaluate runs/CartPole-v1/ppo/seed1 --mode --video
     python -m tools.animation runs/CartPole-v1/ppo/seed1 ... --output docs/learned.webp
"""

import io
import math
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

import tyro

from tools import fail, parse, refuse_missing_folder

try:
    from moviepy import VideoFileClip
    from PIL import Image  # moviepy needs it too
except ImportError:
    fail("animations need moviepy: pip install moviepy")


@dataclass
class Args:
    run_dirs: Annotated[list[str], tyro.conf.Positional]  # runs that tools.evaluate has filmed
    output: str = "learned.webp"  # file to write; a name in .gif gives a GIF
    height: int = 180  # pixels of each film
    seconds: float = 6.0  # of each film, from its start; a shorter one begins again
    fps: int = 15  # frames in a second
    quality: int = 60  # of a WebP, from 0 to 100


def newest_film(run_dir):
    films = sorted(Path(run_dir, "video").glob("*.mp4"), key=lambda path: path.stat().st_mtime)
    if not films:
        fail(f"{run_dir} has no film: python -m tools.evaluate {run_dir} --mode --video")
    return str(films[-1])


def read_frames(path, args):
    """The pictures of a film, of the height and at the rate that are asked for."""
    try:
        with VideoFileClip(path) as film:
            clip = film.subclipped(0, min(args.seconds, film.duration))
            frames = [Image.fromarray(frame) for frame in clip.iter_frames(fps=args.fps)]
    except Exception:  # moviepy raises errors of any type
        fail(f"{path} is not a whole film: make it again")
    width = round(frames[0].width * args.height / frames[0].height)
    return [frame.resize((width, args.height), Image.Resampling.LANCZOS) for frame in frames]


def beside(pictures, gap=6):
    """One picture of several, with a white gap between them."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (width, pictures[0].height), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + gap
    return whole


def refuse_output(path):
    """Exit if no moving picture of this name can be written."""
    refuse_missing_folder(path)
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE_ALL:  # formats that take several pictures
        fail(f"{path} cannot be a moving picture: give a name in .webp or .gif")


def main(args):
    length = args.seconds * args.fps
    count = round(length) if math.isfinite(length) else 0
    if not args.run_dirs or args.height < 1 or count < 1:
        fail("give at least one run, and --height, --seconds and --fps for at least one frame")
    if not 0 <= args.quality <= 100:
        fail(f"--quality must be from 0 to 100, not {args.quality}")
    refuse_output(args.output)
    films = [read_frames(newest_film(run_dir), args) for run_dir in args.run_dirs]
    films = [islice(cycle(frames), count) for frames in films]
    first, *others = [beside(pictures) for pictures in zip(*films)]
    options = dict(append_images=others, duration=round(1000 / args.fps), loop=0)
    whole = io.BytesIO()  # so that one that cannot be encoded replaces no older one
    kind = Image.registered_extensions()[Path(args.output).suffix.lower()]
    try:
        first.save(whole, kind, save_all=True, quality=args.quality, method=6, **options)
        Path(args.output).write_bytes(whole.getvalue())
    except Exception as error:  # each format has errors of its own
        fail(f"cannot write {args.output}: {error}", 1)
    size = Path(args.output).stat().st_size / 1e6
    print(f"{args.output}: {count} frames of {first.width} × {first.height}, {size:.2f} MB")


if __name__ == "__main__":
    main(parse(Args))
