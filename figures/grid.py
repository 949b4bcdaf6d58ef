"""Frames in rows and columns with labels, enlarged without smoothing; the open-loop strip as one of them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, FONT_SIZE = 4, 16  # pixels
CONTEXT, EVERY = 10, 5  # of an open loop: frames that the model sees; frames from one column to the next


def draw(
    rows: Sequence[Sequence[np.ndarray | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    tile: int = 128,
    rule: int | None = None,
) -> Image.Image:
    """Frames (H, W, 3) uint8 as tiles of at least `tile` pixels; None leaves a tile blank.

    `rule` draws a vertical line before that column.
    """
    height, width = next(frame.shape[:2] for row in rows for frame in row if frame is not None)
    scale = -(-tile // min(height, width))
    height, width = scale * height, scale * width
    font = ImageFont.load_default(FONT_SIZE)
    left = max(int(font.getlength(label)) for label in row_labels) + 3 * GAP
    top = FONT_SIZE + 3 * GAP
    size = left + len(column_labels) * (width + GAP), top + len(rows) * (height + GAP)
    picture = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(picture)
    for column, label in enumerate(column_labels):
        canvas.text((left + column * (width + GAP) + width // 2, top // 2), label, "black", font, anchor="mm")
    for i, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + i * (height + GAP)
        canvas.text((left - 2 * GAP, y + height // 2), label, "black", font, anchor="rm")
        for column, frame in enumerate(row):
            if frame is not None:
                enlarged = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
                picture.paste(enlarged, (left + column * (width + GAP), y))
    if rule is not None:
        x = left + rule * (width + GAP) - GAP // 2
        canvas.line([(x, 0), (x, size[1])], "black", 2)
    return picture


def open_loop(columns: np.ndarray, height: int) -> Image.Image:
    """A labelled open-loop strip from every fifth frame (n, rows * height, W, 3); the four or three parts are rows."""
    labels = ["observed", "truth", "model", "error"][4 - columns.shape[1] // height :]
    rows = [list(columns[:, i * height : (i + 1) * height]) for i in range(len(labels))]
    steps = [EVERY * i for i in range(len(columns))]
    titles = [f"{'seen' if t < CONTEXT else 'imagined'} t={t}" for t in steps]
    return draw(rows, labels, titles, rule=CONTEXT // EVERY if steps[-1] >= CONTEXT else None)
