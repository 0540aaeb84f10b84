// The numbers in the definition of the signals. Their table is kernels/signal_constants.py, where each is explained;
// mirror.cpp shows these to Python, which refuses a library that has others.
#pragma once

#include <cstdint>

namespace fq {

constexpr int64_t kSignalSchemaVersion = 2;
constexpr int64_t kRecentTokens = 16;
constexpr int64_t kNumTokenSignals = 12;
constexpr int64_t kNumStepSignals = 4;
constexpr float kEmaDecay = 0.9f;
constexpr float kLogProbabilityFloor = -110.0f;
constexpr float kKlFloorNats = 1e-6f;
constexpr float kStatisticFloor = 1e-6f;
constexpr float kNormFloor = 1e-12f;
constexpr float kSignalLimit = 10.0f;
constexpr float kNatsScale = 4.0f;
constexpr float kDecadesScale = 2.0f;
constexpr float kWidthScale = 8.0f;
constexpr float kPositionScale = 4.0f;

}  // namespace fq
