#!/usr/bin/env python3
"""Leaves out of the bridge what a libtorch does not have:

    leave_out.py SOURCE ERRORS LIBTORCH LACKS

SOURCE is a copy of torch_api_generated.cpp, and ERRORS what the compiler said of it. Every function with an error in it
gets a body that throws a sentence with its name, which tch reports as any error of libtorch; its name goes into LACKS. So
a bridge over a newer libtorch has every function that plugins call, and a plugin that calls one that is gone learns that.

Fails when there is an error outside these functions, as that is no function that has gone.
"""

import re
import sys


def main():
    source, errors, libtorch, lacks = sys.argv[1:]
    with open(source) as file:
        lines = file.read().split("\n")
    with open(errors) as file:
        # Where a template is at fault the compiler names a header, and our line as "required from here".
        said = re.compile(re.escape(source) + r":(\d+):\d+: +(?:error:|required from here)")
        wrong = sorted({int(match.group(1)) - 1 for match in map(said.match, file) if match})
    left_out = set()
    for line in wrong:
        start = max((i for i in range(line + 1) if re.match(r"\w.*\batg_\w+\(.*\{$", lines[i])), default=None)
        if start is None or "}" in lines[start:line]:
            sys.exit(f"{source}:{line + 1}: an error outside of any function")
        name = re.search(r"\batg_(\w+)\(", lines[start]).group(1)
        if name in left_out:
            continue
        left_out.add(name)
        end = lines.index("}", start)
        sentence = f"libtorch {libtorch} has no {name.rstrip('_')} as tch 0.24 calls it"
        result = "" if lines[start].startswith("void") else "  return {};"
        body = [f'  PROTECT(throw std::runtime_error("{sentence}");)', result]
        # As many lines as before, so that the compiler's other line numbers stay right.
        lines[start + 1 : end] = body + [""] * (end - start - 1 - len(body))
    if not left_out:
        sys.exit("no function is at fault")
    with open(source, "w") as file:
        file.write("\n".join(lines))
    with open(lacks, "a") as file:
        file.writelines(f"{name}\n" for name in sorted(left_out))


main()
