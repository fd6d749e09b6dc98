FROM python:3.12-slim

WORKDIR /src
COPY LICENSE README.rst pyproject.toml setup.cfg ./
COPY minibatch ./minibatch
RUN pip install --no-cache-dir . \
    && useradd --create-home --uid 1000 minibatch

USER 1000
WORKDIR /home/minibatch
ENTRYPOINT ["minibatch"]
