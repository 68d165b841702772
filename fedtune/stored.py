"""What safetensors files call the dtypes of `fedtune.tensors`."""

NAME_OF_CODE = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}
CODE_OF_NAME = {name: code for code, name in NAME_OF_CODE.items()}
