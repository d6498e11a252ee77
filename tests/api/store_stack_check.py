"""Makes the media and the stored values of the start-up check: ``python -m tests.api.store_...``.

To be run again only when a golden output changes on purpose, together with
``recipe.PREPROCESSING_VERSION``; `test_parity.py` compares the values with plain transformers.
"""

import json
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from qvl_batch.api.parity import CASES, measure


def write_media(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    y, x = np.mgrid[:150, :200]
    ramp = np.stack([x, y, (x + 2 * y) % 256], axis=-1).astype(np.uint8)
    picture = Image.fromarray(ramp)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((20, 30, 90, 100), fill=(220, 30, 30))
    draw.rectangle((120, 40, 180, 100), fill=(40, 70, 220))
    picture.save(folder / "picture.png", optimize=True)
    (folder / "page.pdf").write_bytes(page())
    with av.open(str(folder / "clip.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=4, options={"crf": "20", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(12):
            image = Image.new("RGB", (160, 120), (20 * number, 120, 250 - 20 * number))
            left = 5 + 10 * number
            ImageDraw.Draw(image).ellipse((left, 40, left + 40, 80), fill=(240, 220, 40))
            output.mux(stream.encode(av.VideoFrame.from_image(image)))
        output.mux(stream.encode(None))


def page() -> bytes:
    """One page of 180 x 240 points: bars whose edges are whole pixels at 144 dpi."""
    bars = [
        f"{0.1 * i:.1f} {0.9 - 0.1 * i:.1f} 0.3 rg 20 {200 - 25 * i} {60 + 10 * i} 15 re f"
        for i in range(7)
    ]
    content = "\n".join(bars).encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 180 240] /Contents 4 0 R >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(data)
    data += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        start,
    )


def main() -> None:
    write_media(CASES)
    stored = {name: asdict(values) for name, values in measure().items()}
    for values in stored.values():
        values["vector"] = [round(value, 7) for value in values["vector"]]
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in stored.items()]
    (CASES / "stored.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
