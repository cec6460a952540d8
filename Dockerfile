# The images of nbdstore, on Debian 12 or newer:
#
#   docker build -t nbdstore .                       the server, as a user without rights
#   docker build -t nbdstore-agent --target agent .  the agent, which needs CAP_SYS_ADMIN
#
# BASE is any image of Debian or Ubuntu with Python 3.11 or newer in its packages.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/*

# What nbdstore needs changes less often than nbdstore: it is a layer of its own.
FROM python AS dependencies
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv
RUN python3 -m venv --without-pip /opt/nbdstore \
 && python3 -m venv /opt/pip
WORKDIR /src
COPY setup.cfg pyproject.toml ./
COPY nbdstore/__init__.py nbdstore/
RUN /opt/pip/bin/pip --python /opt/nbdstore/bin/python install --no-cache-dir . \
 && find /opt/nbdstore -name tests -type d -prune -exec rm -rf {} +

FROM dependencies AS build
COPY nbdstore nbdstore
RUN /opt/pip/bin/pip --python /opt/nbdstore/bin/python install --no-cache-dir \
    --no-deps --ignore-installed --prefix /opt/own .

FROM python AS nbdstore
COPY --from=dependencies /opt/nbdstore /opt/nbdstore
COPY --from=build /opt/own /opt/nbdstore
ENV PATH=/opt/nbdstore/bin:$PATH
ENTRYPOINT ["nbdstore"]

FROM nbdstore AS agent
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
    e2fsprogs fuse3 libnbd-bin mount util-linux xfsprogs \
 && apt-get clean \
 && rm -rf /var/lib/apt/lists/*
VOLUME /var/lib/nbdstore-agent
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s \
    CMD ["nbdstore", "agent", "status", "--check"]
CMD ["agent"]

FROM nbdstore AS server
RUN useradd --system --uid 10809 --home-dir /var/lib/nbdstore nbdstore \
 && install --directory --owner nbdstore --group nbdstore --mode 700 /var/lib/nbdstore
USER nbdstore
ENV NBDSTORE_POOL=/var/lib/nbdstore
VOLUME /var/lib/nbdstore
EXPOSE 10809
# By --server: without it, and without a server, the command would open the pool itself.
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s \
    CMD ["nbdstore", "--server", "unix:/var/lib/nbdstore/control.sock", "pool", "show"]
CMD ["serve", "--create", "--listen", "0.0.0.0:10809"]
