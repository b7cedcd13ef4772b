# The environment and the code, for a cluster that runs containers. The driver is the machine's; CUDA comes with torch's packages.
#
#   docker build -t ablab .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/ablab/runs" ablab trainer=gpu norm=groupnorm
#   docker run --rm --entrypoint make ablab test
#
# With Apptainer: apptainer build ablab.sif docker-daemon://ablab:latest
#                 apptainer run --nv --bind runs:/ablab/runs ablab.sif trainer=ddp
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /ablab

WORKDIR /ablab
ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1

# Made again only when what it is built from changes, not with every line of code.
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p src/ablab && touch src/ablab/__init__.py && make env

COPY . .
ENTRYPOINT ["python", "/ablab/lab/train.py"]
