"""ros2 launch edge_nodes bringup.launch.py robot:=FILE.yaml   (see config/orin_robot.yaml)"""

from edge_nodes.launching import robot_nodes
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument


def generate_launch_description():
    robot = DeclareLaunchArgument("robot", description="YAML file with the robot's nodes")
    return LaunchDescription([robot, robot_nodes()])
