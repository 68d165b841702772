"""A compressed broadcast: the state moves only by steps that a codec can write, so whoever adds them has the same bits.

    step = after - state, and with feedback what earlier steps left out        state' = state + decode(encode(step))

The bytes of the last step lie beside the state, in its private part. A client that holds the version before receives
just them, any other the whole state.

A state that is a history of stacks takes no steps: each round's stack becomes what its bytes say, and these are kept as
long as it is. Clients receive them beside empty arrays that say names, shapes and dtypes, with one axis more.
"""

from collections.abc import Sequence

import numpy as np

from fedtune import history
from fedtune.averaging import public
from fedtune.balance import balanced
from fedtune.codecs.compression import RESIDUAL, Compression, change
from fedtune.method import ClientJob
from fedtune.personal import emptied, is_personal
from fedtune.tensors import DTYPES, PRIVATE, Array, Manifest, Tensors

STEP, CODE = "step", "code"
_STEP, _VERSION, _LEFT = PRIVATE + STEP, PRIVATE + "version", PRIVATE + RESIDUAL
_CODE = PRIVATE + CODE + "-"


def taken(state: Tensors, after: Tensors, downlink: Compression) -> Tensors:
    """Returns the next state as clients can receive it: as near to `after` as one encoded step leads.

    Guarantees: with feedback, states and what is left out telescope as `fedtune.codecs.feedback` says.
    """
    if downlink.exact:
        return after
    before = {name: array for name, array in public(state).items() if array.size}
    manifest = _manifest(before)
    left = {name.removeprefix(PRIVATE): array for name, array in state.items() if name.startswith(_LEFT)}
    step = downlink.carry(change({name: after[name] for name in manifest.names}, before), manifest, left)
    code = b"".join(downlink.coder.encode(step, manifest))
    number = int(state[_VERSION][0]) + 1 if _VERSION in state else 1
    return {
        **after,
        **downlink.added(before, code, manifest),
        **{PRIVATE + name: array for name, array in left.items()},
        _STEP: np.frombuffer(code, np.uint8),
        _VERSION: np.array([number]),
    }


def lacking(state: Tensors, since: int) -> dict[str, Array]:
    """Returns what brings a client from version `since` to `state`: the last step, or the whole."""
    if _STEP in state and since == int(state[_VERSION][0]) - 1:
        return {STEP: state[_STEP]}
    return public(state)


def unpacked(
    job: ClientJob, received: Tensors, downlink: Compression, dtype: str, personal: Sequence[str] = ()
) -> Tensors:
    """Returns the shared state that a step, or the whole state, leads to, where that is an adapter.

    Raises:
        WireError: the bytes are no step for the adapter this client holds.
    """
    if downlink.exact or STEP not in received:
        return received
    held = {name: emptied(name, a) if is_personal(name, personal) else a for name, a in job.attached().items()}
    return stepped({name: array.astype(DTYPES[dtype]) for name, array in held.items()}, received, downlink)


def stepped(before: Tensors, received: Tensors, downlink: Compression) -> Tensors:
    """Returns the state that what was received leads to from the one before.

    Raises:
        WireError: the bytes are no step for that state.
    """
    if downlink.exact or STEP not in received:
        return received
    manifest = _manifest({name: array for name, array in before.items() if array.size})
    return {**before, **downlink.added(before, received[STEP].data, manifest)}


def _manifest(factors: Tensors) -> Manifest:
    """Describes factors in the order of their names, which both sides know."""
    return Manifest.of({name: factors[name] for name in sorted(factors)})


def coded(number: int, factors: Tensors, downlink: Compression) -> dict[str, Array]:
    """Returns a round's stack as clients can receive it, under the names of a history, with its bytes."""
    if downlink.exact:
        return history.numbered(number, factors)
    if downlink.codec == "ternary":
        factors = balanced(factors)
    manifest = _manifest({name: array for name, array in factors.items() if array.size})
    code = b"".join(downlink.coder.encode({name: factors[name] for name in manifest.names}, manifest))
    decoded = history.numbered(number, {**factors, **downlink.coder.decode(code, manifest)})
    return {**decoded, f"{_CODE}{number:06d}": np.frombuffer(code, np.uint8)}


def is_code(name: str) -> bool:
    """Whether a name in the state is of a stack's bytes."""
    return name.startswith(_CODE)


def folded(past: Tensors, state: Tensors) -> dict[str, Array]:
    """Puts bytes in the place of stacks, where `state` has them."""
    codes = {name.removeprefix(_CODE): array for name, array in state.items() if name.startswith(_CODE)}
    sent = {n: np.empty((0, *a.shape), a.dtype) if n[:6] in codes else a for n, a in past.items()}
    return {**sent, **{f"{number}/{CODE}": codes[number] for number in sorted({n[:6] for n in past} & codes.keys())}}


def unfolded(received: Tensors, downlink: Compression) -> Tensors:
    """Returns the stacks that `folded` described; raises WireError for bytes that do not fit them."""
    stacks = {n: a for n, a in received.items() if history.is_past(n)}
    for name in received:
        if not history.is_past(name):
            shells = {n: a for n, a in stacks.items() if n[:6] == name[:6]}
            plain = {n[7:]: np.broadcast_to(np.zeros((), a.dtype), a.shape[1:]) for n, a in shells.items()}
            manifest = _manifest({n: a for n, a in plain.items() if a.size})
            opened = {**plain, **downlink.coder.decode(received[name].data, manifest)}
            stacks.update({n: opened[n[7:]] for n in shells})
    return stacks
