"""Interfaces of geometry_msgs for tests without ROS."""

from layer_interfaces.packages import install

install(__name__)
