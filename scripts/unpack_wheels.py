"""Unpacks wheels into a folder: `unpack_wheels.py TARGET WHEEL...`.

Keeps the wheels' own structure, because libtorch_cpu.so looks for its CUDA libraries at ../../nvidia, and the
execute bits, which zipfile alone drops. Of torch only what C++ needs is taken: the Python code, the tools in
torch/bin and libtorch_python are a tenth of the size and never used.
"""

import os
import sys
import zipfile


def wanted(name: str) -> bool:
    if name.endswith("/"):
        return False
    if name.startswith(("torch/", "torchgen/", "functorch/")):
        return name == "torch/version.py" or (
            name.startswith(("torch/lib/", "torch/include/"))
            and not name.startswith("torch/lib/libtorch_python")
        )
    return True


def main() -> None:
    target, wheels = sys.argv[1], sys.argv[2:]
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            for entry in wheel.infolist():
                if not wanted(entry.filename):
                    continue
                file = wheel.extract(entry, target)
                mode = (entry.external_attr >> 16) & 0o777
                if mode:
                    os.chmod(file, mode | 0o600)


if __name__ == "__main__":
    main()
