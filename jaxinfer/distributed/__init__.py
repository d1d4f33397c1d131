"""Serving one model on the devices of several processes: joining them, and detecting that one has died."""

from jaxinfer.distributed.group import Group as Group
from jaxinfer.distributed.join import PEER_TIMEOUT as PEER_TIMEOUT
from jaxinfer.distributed.join import check_mesh as check_mesh
from jaxinfer.distributed.join import guard as guard
from jaxinfer.distributed.join import initialize as initialize
from jaxinfer.distributed.join import join as join
