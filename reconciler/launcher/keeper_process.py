"""Starts the keeper from its bytecode: ``python -I -S keeper_process.py <sid>``.

A program that is run by path is compiled at every start, and what the compiler took stays with
the process: twice the memory of the keeper itself, and a third of its start. What is imported
comes from the interpreter's own cache, which it checks against the source. So this file is run
in place of the keeper, under its name, which is what a keeper is known by; a cache that cannot
be written (a folder that is read-only) costs that memory and time, and nothing else.
"""

import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import keeper_process  # type: ignore[import-not-found] # behind the standard library, alone

sys.path.pop()

if __name__ == "__main__":
    sys.exit(keeper_process.main(sys.argv[1:]))
