"""Writes the Python messages of `proto/` into the package: `python proto/generate.py [ROOT]`.

Needs grpcio-tools and mypy-protobuf (the `dev` extra). Service stubs are not generated: two of the four methods carry
raw frames, so all four are registered by hand in `fedtune.wire`.
"""

import shutil
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
SOURCES = ("fedtune/wire/v1/coordinator.proto",)


def generate(root: Path) -> None:
    """Writes `*_pb2.py` and `*_pb2.pyi` below `root`; raises SystemExit when the compiler refuses."""
    plugin = shutil.which("protoc-gen-mypy", path=str(Path(sys.executable).parent)) or shutil.which("protoc-gen-mypy")
    if plugin is None:
        raise SystemExit("protoc-gen-mypy is missing: pip install mypy-protobuf")
    include = str(files("grpc_tools") / "_proto")
    flags = [f"-I{PROTO}", f"-I{include}", f"--plugin=protoc-gen-mypy={plugin}"]
    outputs = [f"--python_out={root}", f"--mypy_out=quiet:{root}"]
    if protoc.main(["protoc", *flags, *outputs, *SOURCES]) != 0:
        raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO.parent)
