"""Applications in containers whose data is on block storage, on the platforms that run containers.

A few lines say what should run (`ContainerApp`, `Volume`); an `Orchestration` brings a platform
there and keeps it: starts, updates, scales, stops. Volumes are created by the platform through
nbdstore's drivers for it, and outlive the applications.

    app                  what should run: values, checked
    orchestration        what can be done with it
    platform             what a platform must be able to do, and what it tells
    docker_platform      the Docker Engine API;            docker_errors   its failures
    kubernetes_platform  the Kubernetes API;               manifests       what is applied there
    app_file             the same from YAML
"""

from nbdstore.orchestration.app import ContainerApp, Volume
from nbdstore.orchestration.orchestration import Orchestration
from nbdstore.orchestration.platform import AppStatus, LogLine, Platform, ReplicaStatus

__all__ = [
    "AppStatus",
    "ContainerApp",
    "LogLine",
    "Orchestration",
    "Platform",
    "ReplicaStatus",
    "Volume",
]
