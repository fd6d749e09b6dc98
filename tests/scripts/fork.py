"""A parent and its forked children append through handles made before the forks: python fork.py URL."""
import multiprocessing
import os
import sys
import threading

import minibatch as mb

COUNT = 100
stream = mb.stream('single', url=sys.argv[1])
batched = mb.stream('batched', url=sys.argv[1], batchsize=100, linger=60)


def append(source):
    for seq in range(COUNT):
        stream.append({'source': source, 'seq': seq})


def run(source):
    threads = [threading.Thread(target=append, args=(f'{source}.{i}',)) for i in range(2)]
    for thread in threads:
        thread.start()
    for seq in range(COUNT // 2):
        batched.append({'source': source, 'seq': seq})
    for thread in threads:
        thread.join()


def forked(source):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(source)
            batched.flush()
            code = 0
        finally:
            os._exit(code)
    return pid


for seq in range(COUNT // 2):
    batched.append({'source': 'parent', 'seq': seq})
threads = [threading.Thread(target=append, args=(f'parent.{i}',)) for i in range(4)]
for thread in threads:
    thread.start()
pids = [forked(f'fork{i}') for i in range(3)]
context = multiprocessing.get_context('fork')
processes = [context.Process(target=run, args=(f'process{i}',)) for i in range(3)]
for process in processes:  # they end without a flush
    process.start()
codes = [os.waitpid(pid, 0)[1] for pid in pids]
for process in processes:
    process.join()
for thread in threads:
    thread.join()
assert not any(codes)
assert not any(process.exitcode for process in processes)
