"""One model on the devices of several processes: how they come together, and the watch they keep on each other."""

from jaxinfer.distributed.group import Group as Group
from jaxinfer.distributed.join import PEER_TIMEOUT as PEER_TIMEOUT
from jaxinfer.distributed.join import check_mesh as check_mesh
from jaxinfer.distributed.join import guard as guard
from jaxinfer.distributed.join import initialize as initialize
from jaxinfer.distributed.join import join as join
