"""The images of requests: from what a client names to encoded bytes that are known to be an image.

In: a data: URL, the id of an uploaded file, an http(s) address where that is allowed. Out: bytes whose header was held
against the limits and which decode. Never opens a path that a client names.
"""

from __future__ import annotations

import base64
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmit.data.decode import load_fast
from mmit.data.images import FORMATS, MAX_ASPECT, MIN_SIDE, image_size
from mmit.errors import ImageError
from mmit.records import Image, short
from mmit.serve.refused import Refused, refusal_of

if TYPE_CHECKING:
    from mmit.serve.fetch import Fetcher

_FORMS = "Write data:image/png;base64, and the image's bytes in base64"
# A progressive JPEG has about ten; each is a pass over all pixels, and a file of kilobytes can hold thousands.
MAX_SCANS = 100
DECODED_AT_ONCE = 2  # images at a time, so that the memory of requests is bounded


@dataclass(frozen=True)
class StoredFile:
    """An uploaded image; `owner` is who may name it."""

    id: str
    owner: str
    name: str
    purpose: str
    content: bytes
    created: int

    def to_json(self) -> dict[str, Any]:
        """The file object of OpenAI's API."""
        told = {"id": self.id, "object": "file", "bytes": len(self.content), "created_at": self.created}
        return {**told, "filename": self.name, "purpose": self.purpose, "status": "processed"}


class Files:
    """Uploaded images, in memory until the server ends; the oldest leave when there are too many.

    Args:
        count: most files. size: most bytes of all of them.
    """

    def __init__(self, *, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._files: OrderedDict[str, StoredFile] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, content: bytes, *, owner: str, name: str, purpose: str) -> StoredFile:
        """Keep an image, and let the oldest go while there are too many.

        Args:
            content: the encoded image, which was checked before.
            owner: who may ask for it, a stand-in for the key. name, purpose: as its uploader told them.
        """
        made = StoredFile(f"file-{secrets.token_hex(12)}", owner, name, purpose, content, int(time.time()))
        with self._lock:
            self._files[made.id] = made
            while len(self._files) > self._count or sum(len(f.content) for f in self._files.values()) > self._size:
                self._files.popitem(last=False)
        return made

    def get(self, name: str, owner: str, *, param: str | None = None) -> StoredFile:
        """Return a file. Raises Refused."""
        with self._lock:
            found = self._files.get(name)
        if found is None or found.owner != owner:
            raise Refused(404, f"no file '{short(name)}'", "Upload it again: POST /v1/files", param=param)
        return found

    def owned(self, owner: str) -> list[StoredFile]:
        """Every file of an owner."""
        with self._lock:
            return [file for file in self._files.values() if file.owner == owner]

    def remove(self, name: str, owner: str) -> None:
        """Forget a file. Raises Refused."""
        self.get(name, owner)
        with self._lock:
            self._files.pop(name, None)


@dataclass(frozen=True)
class Images:
    """Where the images of requests come from.

    Args:
        pixels: most of one image, by its header. fetcher: None where no address is fetched.
    """

    pixels: int
    files: Files
    fetcher: Fetcher | None = None
    _decoding: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(DECODED_AT_ONCE), repr=False)

    def read(self, source: str, *, owner: str, param: str) -> bytes:
        """Return the bytes of the image that a client names. Raises Refused."""
        kind = source.partition(":")[0].lower()
        if kind == "data":
            content = _data_url(source, param)
        elif source.startswith("file-"):
            return self.files.get(source, owner, param=param).content
        elif kind not in ("http", "https"):
            remedy = f"{_FORMS}, or upload it to /v1/files and give its id"
            raise Refused(400, f"'{short(source)}' is no image", remedy, param=param, code="invalid_image")
        elif self.fetcher is None:
            problem = "this server fetches no images from addresses"
            remedy = "Send a data: URL; whoever runs the server may allow hosts with --allow-url"
            raise Refused(400, problem, remedy, param=param, code="url_refused")
        else:
            content = self.fetcher.get(source, param=param)
        self.check(content, param=param)
        return content

    def check(self, content: bytes, *, param: str) -> None:
        """Refuse what is no image, is too large by its header, or does not decode. Raises Refused."""
        try:
            width, height = image_size(Image(content))
        except ImageError as error:
            remedy = f"Send one of {', '.join(FORMATS)}; if it is one, it is damaged"
            raise Refused(400, error.problem, remedy, param=param, code="invalid_image") from error
        problem = ""
        if width * height > self.pixels:
            problem = f"{width} x {height} pixels are more than the {self.pixels:,} allowed"
        elif min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            problem = f"{width} x {height} pixels: a side is under {MIN_SIDE}, or over {MAX_ASPECT} times the other"
        elif content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MAX_SCANS:
            problem = f"a JPEG of more than {MAX_SCANS} scans"
        if problem:
            remedy = "Scale, crop or save the image anew"
            raise Refused(400, problem, remedy, param=param, code="invalid_image")
        try:
            with self._decoding:
                load_fast(Image(content))
        except ImageError as error:
            raise refusal_of(error, param=param) from error


def _data_url(source: str, param: str) -> bytes:
    head, comma, data = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refused(400, "a data: URL that is not base64", _FORMS, param=param, code="invalid_image")
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise Refused(400, f"broken base64: {error}", _FORMS, param=param, code="invalid_image") from error
    if not content:
        raise Refused(400, "the image is empty", _FORMS, param=param, code="invalid_image")
    return content
