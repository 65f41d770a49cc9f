"""A stand-in agent whose reader outlives it: what is in the pipe when the keeper dies, counts.

``outlive.py <file> <bytes per read> <seconds between reads>``
"""

import os
import sys
import time

if os.fork():
    while True:
        time.sleep(60)
size, pause = int(sys.argv[2]), float(sys.argv[3])
agent = os.getppid()
with open(sys.argv[1] + ".part", "wb", buffering=0) as file:
    while block := os.read(0, size):
        file.write(block)
        if os.getppid() == agent:
            time.sleep(pause)
os.rename(sys.argv[1] + ".part", sys.argv[1])
