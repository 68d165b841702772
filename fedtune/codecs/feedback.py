"""Error feedback: what a codec leaves out of one update is added to the next (Seide et al. 2014; Stich et al. 2018).

    wanted = update + carried        sent = decode(encode(wanted))        carried = wanted - sent

Sums telescope: all that was ever sent, plus what is still carried, is all that was ever wanted. They do so exactly,
because what is carried is kept as whole numbers of 2^-52, where addition does not round.
"""

import numpy as np

from fedtune.codecs.codec import Codec
from fedtune.errors import WireError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors

UNIT = 2.0**-52
LIMIT = 512.0  # both addends below it: no sum of three reaches 2^63 units
_INTEGERS = ("int64", "int32", "uint8")


def carry(
    codec: Codec, tensors: Tensors, manifest: Manifest, carried: Tensors
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Adds to an update what earlier ones left out, and finds what will be left out of the sum.

    Args:
        codec: the lossy codec.
        tensors: the update; integer tensors are sent as they are and carry nothing.
        manifest: of the update.
        carried: what the last call returned, or nothing at first; int64, in units of 2^-52.

    Returns:
        What to encode, and what is carried once that is sent.

    Guarantees: sent + carried afterwards == update + carried before, exactly, for values that are multiples of 2^-52
        (float32 and bfloat16 of magnitude 2^-29 and above, all of float16); smaller ones are rounded to that first.

    Raises:
        WireError: a value reaches 512 in magnitude: training diverged.
    """
    whole: dict[str, Array] = {}
    for spec in manifest.specs:
        if spec.dtype not in _INTEGERS:
            before = carried.get(spec.name)
            whole[spec.name] = units(tensors[spec.name], spec.name)
            if before is not None:
                whole[spec.name] += _checked(before, whole[spec.name], spec.name)
    wanted = {s.name: _values(whole[s.name], s.dtype) if s.name in whole else tensors[s.name] for s in manifest.specs}
    sent = codec.decode(b"".join(codec.encode(wanted, manifest)), manifest)
    return wanted, {name: array - units(sent[name], name) for name, array in whole.items()}


def units(values: Array, name: str) -> Array:
    """Counts `values` in units of 2^-52 (int64, rounded); raises WireError for magnitudes of 512 and more."""
    wide = values.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    if not largest < LIMIT:
        raise WireError(problem(name, f"magnitudes below {LIMIT:.0f}", largest, "Training diverged"))
    return np.rint(wide / UNIT).astype(np.int64)


def _values(wanted: Array, dtype: str) -> Array:
    return (wanted * UNIT).astype(DTYPES[dtype])


def _checked(before: Array, wanted: Array, name: str) -> Array:
    """Returns what was carried, if it fits and has not grown out of bounds."""
    if before.dtype != np.int64 or before.shape != wanted.shape:
        raise WireError(problem(f"carried {name}", f"int64 of {wanted.shape}", f"{before.dtype} of {before.shape}"))
    if before.size and max(int(before.max()), -int(before.min())) >= LIMIT / UNIT:
        raise WireError(problem(f"carried {name}", f"magnitudes below {LIMIT:.0f}", "more", "Training diverged"))
    return before
