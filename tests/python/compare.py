"""Compares what `hotset load --digest --json` printed with what the safetensors package reads from the same file.

usage: compare.py REPORT.json MODEL.safetensors

Every tensor must be there on both sides with the same dtype, shape and SHA-256 of its bytes. Exit status 1 otherwise.
"""

import hashlib
import json
import sys

from safetensors import safe_open

# As safetensors names them, by numpy's names.
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}


def main() -> int:
    report, path = sys.argv[1:]
    with open(report, encoding="utf-8") as file:
        components = json.load(file)["components"]
    leased = {tensor["name"]: tensor for component in components for tensor in component["tensors"]}
    wrong = []
    with safe_open(path, framework="numpy") as file:
        names = set(file.keys())
        wrong += [f"{name}: not leased" for name in sorted(names - leased.keys())]
        wrong += [f"{name}: not in the file" for name in sorted(leased.keys() - names)]
        for name in sorted(names & leased.keys()):
            array = file.get_tensor(name)
            read = (DTYPES[array.dtype.name], list(array.shape), hashlib.sha256(array.tobytes()).hexdigest())
            tensor = leased[name]
            got = (tensor["dtype"], tensor["shape"], tensor["sha256"])
            if read != got:
                wrong.append(f"{name}: safetensors reads {read}, hotset leases {got}")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(names)} tensors compared, {len(wrong)} wrong")
    return 1 if wrong or not names else 0


if __name__ == "__main__":
    sys.exit(main())
