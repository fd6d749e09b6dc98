"""A streaming web app: watch it at http://127.0.0.1:5000. Also runs as `gunicorn webapp:app`."""

import minibatch as mb
from minibatch.contrib.apps import StreamingApp

app = StreamingApp('readings')  # appending over HTTP needs the environment variable MINIBATCH_APP_TOKEN


def consumer(url):
    @mb.streaming('readings', size=2, url=url)
    def mean(window):
        print(sum(reading['celsius'] for reading in window.data) / len(window), flush=True)


app.start_streaming(consumer)
if __name__ == '__main__':
    app.run()
