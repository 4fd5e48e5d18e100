"""Interfaces of rmw_dds_common for tests without ROS."""

from layer_interfaces.packages import install

install(__name__)
