"""Read handwritten digits with a costly function: in one worker process, in two, and on a Dask cluster of two.

    pip install '.[dask]' scikit-learn matplotlib
    python examples/digits.py            # 890 images, or, with a number, so many

The model looks at each image in 45 ways. It is trained here, and travels to the workers with the function.
"""

import os
import sys
import time

import numpy as np
from dask.distributed import LocalCluster
from matplotlib.figure import Figure
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import minibatch as mb

HALF, SIZE = 899, 10  # of the 1,797 images so many are for training; images in a window
SHIFTS = [(y, x) for y in (-0.3, 0, 0.3) for x in (-0.3, 0, 0.3)]
TURNS = (-8, -4, 0, 4, 8)  # degrees


def ways(image):
    turned = [ndimage.rotate(image, degrees, reshape=False, order=1) for degrees in TURNS]
    return [ndimage.shift(each, shift, order=1).ravel() for each in turned for shift in SHIFTS]


def read(window):
    images = [np.reshape(data['image'], (8, 8)).astype(float) for data in window.data]
    votes = model.predict(np.concatenate([ways(image) for image in images])).reshape(len(images), -1)
    digits = [int(np.bincount(each).argmax()) for each in votes]
    return [[data['number'], digit, os.getpid()] for data, digit in zip(window.data, digits, strict=True)]


class Results(list):  # a sink that knows when results came
    def put(self, results):
        self.times = [*getattr(self, 'times', []), time.perf_counter()]
        self.extend(results)


def measure(name, images, **options):
    """Images a second from the first result to the last, and the digits found."""
    stream, results = mb.stream('example-digits'), Results()
    stream.clear()
    stream.append_many({'number': i, 'image': image.ravel().tolist()} for i, image in enumerate(images))
    consumer = mb.make_emitter('example-digits', read, size=SIZE, sink=results, **options)
    consumer.start()
    while len(results) < len(images) and consumer.error is None:
        time.sleep(0.1)
    consumer.stop()
    rate = (len(results) - SIZE) / (results.times[-1] - results.times[0])
    print(f'{name:22} {len(results)} images, {rate:4.0f} a second, in {len({pid for *_, pid in results})} processes')
    return rate, {number: digit for number, digit, _ in results}


if __name__ == '__main__':
    digits = load_digits()
    model = SVC(gamma=0.001).fit(digits.data[:HALF], digits.target[:HALF])
    images = digits.images[HALF:][: (max(int(sys.argv[1]), 20) if len(sys.argv) > 1 else HALF) // SIZE * SIZE]
    done = {f'{n} worker process{"es" * (n > 1)}': measure(f'workers={n}', images, workers=n) for n in (1, 2)}
    local = {'host': '127.0.0.1', 'dashboard_address': '127.0.0.1:0', 'silence_logs': 'CRITICAL'}  # also when closing
    with LocalCluster(n_workers=2, threads_per_worker=1, **local) as cluster:
        dask = cluster.scheduler_address.replace('tcp', 'dask')
        done['Dask, 2 processes'] = measure("executor='dask://...'", images, executor=dask)
    rates, (first, *others) = [rate for rate, _ in done.values()], [found for _, found in done.values()]
    for name, rate in zip(done, rates, strict=True):
        print(f'{name:22} {"█" * round(25 * rate / rates[0])} {rate / rates[0]:.2f}')
    assert all(found == first for found in others)
    right = sum(digits.target[HALF + number] == digit for number, digit in first.items())
    print(f'{right} of {len(images)} digits are read right, each time the same')
    axes = (figure := Figure(figsize=(8, 2.5), layout='constrained')).subplots()
    axes.bar_label(axes.barh(list(done), rates, color='#2a6f97'), [f' {rate / rates[0]:.2f} x' for rate in rates])
    axes.set(xlabel='images a second', xlim=(0, 1.1 * max(rates)), ylim=(2.6, -0.6))
    axes.set_title(f'Handwritten digits, read on {os.cpu_count()} cores')
    figure.savefig('digits.png', dpi=100)
