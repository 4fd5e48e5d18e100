"""ros2 launch edge_nodes planner.launch.py [engine:=FILE] [params:=FILE] [autostart:=false]"""

from edge_nodes.launching import arguments, one_node
from launch import LaunchDescription


def generate_launch_description():
    return LaunchDescription([*arguments("planner"), one_node("planner")])
