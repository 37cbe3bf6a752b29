#!/usr/bin/env python3
"""Exit 0 if a Flower program answers at ADDRESS, where its --health-server-address is: healthy.py ADDRESS."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.RpcError as error:
        sys.exit(f"{sys.argv[1]} does not answer: {error.code()}")
if answer.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit(f"{sys.argv[1]} is not serving")
