# One image for every role.
#
#   docker build -t disaggd .
#   docker run --rm --network host --gpus all disaggd                       the whole cluster of the file
#   docker run --rm --network host --gpus all -v ./my.toml:/etc/disaggd/config.toml:ro \
#       -e HEALTH_URL=http://127.0.0.1:8101/health disaggd --name p0        one node of it

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS build
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/disaggd
WORKDIR /src
COPY constraints.txt ./
# A layer of its own: 3 GB that change with the constraints only.
RUN /opt/disaggd/bin/pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY disaggd ./disaggd
RUN /opt/disaggd/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
# gcc: Triton compiles a launcher for each kernel.
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-dev gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 disaggd
COPY --from=build /opt/disaggd /opt/disaggd
COPY config.toml /etc/disaggd/config.toml
ENV PATH=/opt/disaggd/bin:$PATH DISAGGD_CONFIG=/etc/disaggd/config.toml HEALTH_URL=http://127.0.0.1:8000/health
USER disaggd
WORKDIR /home/disaggd
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=2)"]
# It drains the nodes, which takes [cluster] drain_s at most; docker kills after 10 s: `docker run --stop-timeout 60` gives them time.
STOPSIGNAL SIGTERM
ENTRYPOINT ["disaggd"]
CMD ["up"]
