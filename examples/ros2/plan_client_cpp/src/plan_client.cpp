// Ask the planner node for a plan with a deadline, and print its calls.
//
//   ros2 launch edge_nodes planner.launch.py
//   ros2 run plan_client_cpp plan_client bring me the red mug from the kitchen

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

#include "edge_interfaces/action/make_plan.hpp"
#include "rclcpp/rclcpp.hpp"
#include "rclcpp_action/rclcpp_action.hpp"

using MakePlan = edge_interfaces::action::MakePlan;
using GoalHandle = rclcpp_action::ClientGoalHandle<MakePlan>;
using namespace std::chrono_literals;

static void print(const edge_interfaces::msg::SkillCall & call)
{
  std::string words;
  for (const auto & argument : call.arguments) {
    words += (words.empty() ? "" : ", ") + argument.name + "='" + argument.value + "'";
  }
  std::printf("  %s(%s)\n", call.skill.c_str(), words.c_str());
}

int main(int argc, char ** argv)
{
  const auto arguments = rclcpp::init_and_remove_ros_arguments(argc, argv);
  std::string command;
  for (std::size_t i = 1; i < arguments.size(); ++i) {
    command += (command.empty() ? "" : " ") + arguments[i];
  }
  if (command.empty()) {
    command = "bring me the red mug from the kitchen";
  }

  auto node = std::make_shared<rclcpp::Node>("plan_client");
  auto client = rclcpp_action::create_client<MakePlan>(node, "make_plan");
  if (!client->wait_for_action_server(10s)) {
    RCLCPP_ERROR(node->get_logger(), "no planner: ros2 launch edge_nodes planner.launch.py");
    return 1;
  }

  MakePlan::Goal goal;
  goal.command = command;
  goal.deadline.sec = 2;  // from when the goal arrives; the node aborts a plan that is late

  rclcpp_action::Client<MakePlan>::SendGoalOptions options;
  options.feedback_callback =
    [](GoalHandle::SharedPtr, const std::shared_ptr<const MakePlan::Feedback> feedback) {
      for (const auto & call : feedback->calls) {
        print(call);  // while the rest of the plan is still written
      }
    };

  auto sent = client->async_send_goal(goal, options);
  if (rclcpp::spin_until_future_complete(node, sent, 10s) != rclcpp::FutureReturnCode::SUCCESS) {
    RCLCPP_ERROR(node->get_logger(), "the planner did not answer");
    return 1;
  }
  const auto handle = sent.get();
  if (!handle) {
    RCLCPP_ERROR(node->get_logger(), "the goal was rejected; the reason is on the node's ~/rejections");
    return 1;
  }
  auto ended = client->async_get_result(handle);
  if (rclcpp::spin_until_future_complete(node, ended, 10s) != rclcpp::FutureReturnCode::SUCCESS) {
    RCLCPP_ERROR(node->get_logger(), "no result");
    return 1;
  }
  const auto result = ended.get().result;
  std::printf(
    "%s: %zu calls, %.1f ms in all\n", result->finish_reason.c_str(), result->plan.calls.size(),
    static_cast<double>(result->timing.total_ms));
  rclcpp::shutdown();
  return result->plan.complete ? 0 : 1;
}
