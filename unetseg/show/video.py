"""Videos, frame by frame, by OpenCV's FFmpeg."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..files import FileError
from ..images import BadFile, cv2


def frames_of(path: Path) -> tuple[float, Iterator[np.ndarray]]:
    """Frames per second, and the frames, upright, RGB (H, W, 3) uint8, one at a time. Raises BadFile, also at an end
    that comes before the one that the file declares."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # which OpenCV does not survive
        raise BadFile(f"{path!r}: expected a name in UTF-8 for a video; rename it") from None
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what goes wrong is said below
    video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not video.isOpened():
        raise BadFile(f"{path}: expected a video that FFmpeg reads, found none")
    fps, expected = video.get(cv2.CAP_PROP_FPS), int(video.get(cv2.CAP_PROP_FRAME_COUNT))

    def frames() -> Iterator[np.ndarray]:
        count = 0
        with tqdm(desc=path.name, total=expected if expected > 0 else None, unit="frame", delay=1, leave=False) as bar:
            while (found := video.read())[0]:
                yield cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB)
                count += 1
                bar.update()
        video.release()
        if not count or count + 2 < 0.9 * expected:  # what containers declare is an estimate
            raise BadFile(f"{path}: expected {expected} frames, found {count} that can be read; copy the file again")

    return (fps if 0 < fps < 1000 else 25.0), frames()


@contextmanager
def written_video(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends RGB frames (H, W, 3) uint8 to an MPEG-4 file, which appears when the block ends well."""
    temporary, writer, count = path.with_name(f".{path.name}.part.mp4"), None, 0

    def write(frame: np.ndarray) -> None:
        nonlocal writer, count
        frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]  # the format has even sides
        if writer is None:
            fourcc = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(temporary), cv2.CAP_FFMPEG, fourcc, fps, frame.shape[1::-1])
            if not writer.isOpened():
                raise BadFile(f"{path}: cannot be written as a video of {frame.shape[1]}x{frame.shape[0]}")
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        count += 1

    try:
        yield write
        writer.release()
        if cv2.VideoCapture(str(temporary)).get(cv2.CAP_PROP_FRAME_COUNT) != count:  # nothing else says so
            raise OSError(errno.ENOSPC, "not all frames could be written; is the disk full?")
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(error.errno, error.strerror, str(path)) from None
    finally:
        if writer is not None:
            writer.release()
        temporary.unlink(missing_ok=True)
