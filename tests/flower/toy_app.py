"""The files of a Flower app whose nodes need no torch."""

TOY = '''
"""A node without torch, and ways to fail."""

import os
import signal
import struct
from pathlib import Path

from fedtune.testing import ToyWorker


def open_worker(config, shared, index, on_step):
    fault = config.data.label if config.data.client_key == config.client.id else ""

    def delay():
        if fault == "raise":
            raise ValueError("the toy was told to fail")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        (Path(config.model.name).parent / f"{config.client.id}.{os.getpid()}.pid").touch()

    return ToyWorker(Path(config.model.name), seed=shared.seed, examples=10 + 3 * (index or 0), delay=delay)


def nan_mod(message, context, call_next):
    """Sends NaN as a hostile node would: with a header that fits."""
    from fedtune.flower.messages import as_array, content, read_array
    from fedtune.flower.packets import UPDATE, pack, unpack
    from fedtune.wire.frames import sha256
    from fedtune.wire.v1 import coordinator_pb2 as pb

    reply = call_next(message, context)
    array = read_array(reply)
    if context.run_config["data.label"] != "nan" or array.stype != UPDATE:
        return reply
    packet = unpack(array.data)
    header = pb.SubmitHeader.FromString(packet.headers[0])
    if header.client_id == context.run_config["data.client_key"]:
        payload = struct.pack("<f", float("nan")) + bytes(packet.payload[4:])
        header.sha256 = sha256([payload])
        reply.content = content(as_array(UPDATE, pack([header.SerializeToString()], [payload])))
    return reply
'''
CLIENT_APP = """
from fedtune.flower.client import client_app
from fedtune_app.toy import nan_mod, open_worker

app = client_app(open_worker, mods=[nan_mod])
"""
