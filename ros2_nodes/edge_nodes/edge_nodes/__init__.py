"""Lifecycle nodes that serve edge_runtime engines to ROS 2.

Files that know ROS: edge_node, language_node, planner_node, parameters, qos, diagnostics, deferred_action,
translation. The others do the work and are tested without it.
"""
