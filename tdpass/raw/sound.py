"""Sound: by the model's feature extractor, at the rate that this wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdpass.errors import InvalidModelError, UsageError
from tdpass.optional import optional
from tdpass.raw.base import RawKind, Reader, register_raw_kind, spread

Wave = tuple[np.ndarray, int]


@register_raw_kind
class Sound(RawKind):
    """Sound files, whose channels are taken together; any other than `.wav` need the package soundfile."""

    name = "sound"
    what = "feature extractor"
    suffixes = frozenset({".wav", ".flac", ".ogg", ".mp3"})
    feature = "Audio"

    def read(self, path: Path, reader: Reader, most: int) -> object:
        return self._made([_wave(file) for file in spread(self.files(path), most)], reader)

    def made(self, column: Sequence[Any], reader: Reader) -> object:
        return self._made([(np.asarray(one["array"]), int(one["sampling_rate"])) for one in column], reader)

    def _made(self, waves: Sequence[Wave], reader: Reader) -> object:
        if not waves:
            raise UsageError("there is no sound to read; give .wav files")
        extractor = reader.hugging_face("AutoFeatureExtractor", self.what)
        rate = int(extractor.sampling_rate)
        heard = [_resampled(samples, given, rate) for samples, given in waves]
        data = dict(extractor(heard, sampling_rate=rate, padding=True, return_tensors="pt"))
        start = getattr(reader.config, "decoder_start_token_id", None)
        if getattr(reader.config, "is_encoder_decoder", False) and start is not None:
            data["decoder_input_ids"] = torch.full((len(heard), 1), start, dtype=torch.int64)
        return data


def _wave(file: Path) -> Wave:
    """One channel of float32 in -1 to 1, and its samples a second."""
    try:
        if file.suffix.lower() != ".wav":
            library: Any = optional("soundfile", "soundfile", f"reading {file.name}")
            samples, rate = library.read(str(file), dtype="float32")
        else:
            from scipy.io import wavfile  # noqa: PLC0415 - takes half a second, and only sound needs it

            rate, samples = wavfile.read(file)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidModelError(
            f"cannot read the sound {file}: {error}; remove it, or write it again"
        ) from None
    if samples.dtype.kind in "iu":
        samples = samples.astype(np.float32) / float(np.iinfo(samples.dtype).max)
    return samples.astype(np.float32).reshape(len(samples), -1).mean(1), int(rate)


def _resampled(samples: np.ndarray, given: int, wanted: int) -> np.ndarray:
    if given == wanted:
        return samples
    from scipy.signal import resample_poly  # noqa: PLC0415 - as above

    shared = math.gcd(given, wanted)
    found: np.ndarray = resample_poly(samples, wanted // shared, given // shared)
    return found.astype(np.float32)
