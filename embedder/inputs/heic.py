"""A HEIC image -> its pixels, as pi-heif decodes it, but with an error if a part of the picture cannot be decoded.

Unless its option `strict_decoding` is set, libheif fills the area of a damaged or missing tile with green, and pi-heif
cannot set this option. So pi-heif reads the header, and this module decodes with the public C functions of the libheif
that is part of pi-heif.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack

import _pi_heif
import numpy as np
import PIL.Image

# Strict decoding also refuses a color space of an unknown number. The pixels are all there, so it is taken for sRGB.
_COLOR_ERRORS = (133, 134, 135)  # `heif_suberror_Unknown_NCLX_..`
_MONOCHROME = (2, 0, 0)  # color space, chroma and channel, by their numbers in heif_image.h
_LAYOUTS = {"L": _MONOCHROME, "I;16": _MONOCHROME, "RGB": (1, 10, 10), "RGBA": (1, 11, 10), "RGBa": (1, 11, 10)}


class _Error(ctypes.Structure):
    """`heif_error`."""

    _fields_ = (("code", ctypes.c_int), ("subcode", ctypes.c_int), ("message", ctypes.c_char_p))


class _Options(ctypes.Structure):
    """The beginning of `heif_decoding_options`, to which new versions of libheif append."""

    _fields_ = (
        ("version", ctypes.c_uint8),
        ("ignore_transformations", ctypes.c_uint8),
        ("callbacks", ctypes.c_void_p * 4),
        ("convert_hdr_to_8bit", ctypes.c_uint8),
        ("strict_decoding", ctypes.c_uint8),
    )


def _load_library() -> ctypes.CDLL:
    """The functions of libheif, found through the module that is linked with it."""
    library = ctypes.CDLL(_pi_heif.__file__)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    signatures = {
        "heif_context_alloc": (pointer,),
        "heif_context_read_from_memory_without_copy": (_Error, pointer, ctypes.c_char_p, ctypes.c_size_t, pointer),
        "heif_context_set_max_decoding_threads": (None, pointer, number),
        "heif_context_get_primary_image_handle": (_Error, pointer, pointer),
        "heif_context_free": (None, pointer),
        "heif_image_handle_release": (None, pointer),
        "heif_decoding_options_alloc": (ctypes.POINTER(_Options),),
        "heif_decoding_options_free": (None, pointer),
        "heif_decode_image": (_Error, pointer, pointer, number, number, pointer),
        "heif_image_get_plane_readonly": (pointer, pointer, number, pointer),
        "heif_image_get_primary_width": (number, pointer),
        "heif_image_get_primary_height": (number, pointer),
        "heif_image_release": (None, pointer),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_HEIF = _load_library()


def decode_heic(data: bytes, mode: str, bit_depth: int) -> PIL.Image.Image:
    """The primary picture of a file, turned and cropped as the file says. `mode` and `bit_depth`: pi-heif's.

    Raises `ValueError`.
    """
    with ExitStack() as stack:
        context = _HEIF.heif_context_alloc()
        stack.callback(_HEIF.heif_context_free, context)
        _check(_HEIF.heif_context_read_from_memory_without_copy(context, data, len(data), None))
        _HEIF.heif_context_set_max_decoding_threads(context, 1)  # each item is decoded by one CPU
        handle = ctypes.c_void_p()
        _check(_HEIF.heif_context_get_primary_image_handle(context, ctypes.byref(handle)))
        stack.callback(_HEIF.heif_image_handle_release, handle)
        image = _decode(handle, mode)
        stack.callback(_HEIF.heif_image_release, image)
        return _copy(image, mode, bit_depth)


def _decode(handle: ctypes.c_void_p, mode: str) -> ctypes.c_void_p:
    color_space, chroma, _ = _LAYOUTS[mode]
    image = ctypes.c_void_p()
    options = _HEIF.heif_decoding_options_alloc()
    try:
        options.contents.convert_hdr_to_8bit = mode != "I;16"
        for is_strict in (1, 0):
            options.contents.strict_decoding = is_strict
            error = _HEIF.heif_decode_image(handle, ctypes.byref(image), color_space, chroma, options)
            if error.subcode not in _COLOR_ERRORS:
                break
        _check(error)
    finally:
        _HEIF.heif_decoding_options_free(options)
    return image


def _copy(image: ctypes.c_void_p, mode: str, bit_depth: int) -> PIL.Image.Image:
    stride = ctypes.c_int()
    plane = _HEIF.heif_image_get_plane_readonly(image, _LAYOUTS[mode][2], ctypes.byref(stride))
    size = _HEIF.heif_image_get_primary_width(image), _HEIF.heif_image_get_primary_height(image)
    if not plane:
        raise ValueError("the decoder returns no pixels")
    buffer = (ctypes.c_ubyte * (stride.value * size[1])).from_address(plane)
    copy = PIL.Image.frombytes(mode, size, memoryview(buffer), "raw", mode, stride.value)
    return PIL.Image.fromarray(np.asarray(copy) << (16 - bit_depth)) if mode == "I;16" else copy


def _check(error: _Error) -> None:
    if error.code:
        raise ValueError(error.message.decode("utf-8", "replace"))
