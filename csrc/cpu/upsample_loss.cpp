// upsample_cross_entropy on the CPU: cross-entropy of bilinearly interpolated scores and the scores' gradient in one pass.
//
//   u_c = interpolated scores;  loss = on * lse(u) - own * u_y - s/C sum_c w_c u_c
//   own = (1-s) w_y;  on = own + s/C sum_c w_c                                        (s: label smoothing; w: class weights)
//   reads scores [B,C,h,w] (one row in 4 twice) and labels [B,H,W] once; writes grad_scores once (one row in 4 twice), loss
//   [B,H,W] if asked. [B,C,H,W] never exists: a group of 4 pixels x C lives in L1. Compute-bound: B*H*W*C exponentials.
// Plan: a unit is a block of cell rows of one sample; vector lanes are classes (upsample_unit.h) or, where those are few,
// pixels (upsample_planes_unit.h). Deterministic: blocks depend on sizes alone. A block hands the gradient of the first row
// behind it to a border buffer that is added afterwards; sums of blocks are added in order. Reference:
// dnc_kernels/ops/upsample/reference.py.
#include <omp.h>

#include "upsample_planes_unit.h"
#include "upsample_unit.h"

namespace dnc::cpu::DNC_ISA {
namespace {

// All units of a call, whatever its lanes are; `shape` says how rows are laid out.
template <class Unit, class Shape, class T>
Status run(const UpsampleCrossEntropy& a, const UpsamplePlan<T>& plan, const Shape& shape, const LossTables<T>& tables) {
  const Status out_of_memory{Code::out_of_memory, 0, 0, "not enough memory"};
  // without blended rows nothing is handed on
  const bool handed = a.grad_scores && plan.rows.source != plan.rows.target && plan.blocks > 1;
  const int64_t units = plan.units(), row_size = int64_t(Unit::row_size(shape));
  Scratch border(handed ? size_t(units * row_size) * sizeof(T) : 0), unit_sums(size_t(units) * sizeof(UnitSums));
  if (!border.data || !unit_sums.data) return out_of_memory;
  const int threads = plan.threads(a.threads);
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    Scratch memory(Unit::bytes(shape));
    failed = !memory.data;
    Unit unit(a, shape, tables, memory.data);
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; u++) {
      if (failed) continue;
      const int64_t r0 = u % plan.blocks * plan.block, r1 = r0 + plan.block < plan.h ? r0 + plan.block : plan.h;
      unit.run(u / plan.blocks, r0, r1, handed && r1 < plan.h ? border.as<T>() + u * row_size : nullptr);
      unit_sums.as<UnitSums>()[u] = unit.sums;
    }
    if (handed) {
#pragma omp for schedule(static)
      for (int64_t u = 0; u < units; u++)
        if (!failed && (u + 1) % plan.blocks != 0)
          Unit::add_border(a, shape, u / plan.blocks, (u % plan.blocks + 1) * plan.block, border.as<T>() + u * row_size);
    }
  }
  if (failed) return out_of_memory;
  double total[2] = {0, 0};
  for (int64_t u = 0; u < units; u++) {
    const UnitSums& s = unit_sums.as<UnitSums>()[u];
    if (s.bad_index >= 0)
      return {Code::bad_label, s.bad_index, s.bad_label, "labels must be in [0,C), ignore_index or negative"};
    total[0] += s.loss, total[1] += s.weight;
  }
  if (a.sums) std::memcpy(a.sums.data, total, sizeof total);
  return {};
}

template <class T>
Status loss(const UpsampleCrossEntropy& a) {
  const Status out_of_memory{Code::out_of_memory, 0, 0, "not enough memory"};
  const UpsamplePlan<T> plan(a.scores, a.labels.size[1], a.labels.size[2], a.align_corners, a.source_rows, a.source_row0,
                             a.target_rows, a.target_row0);
  const int64_t last = plan.target_row0 + plan.H - 1, bottom = plan.source_row0 + plan.h - 1;
  if (plan.source_row0 < 0 || bottom >= plan.rows.source || plan.target_row0 < 0 || last >= plan.rows.target)
    return bad_argument("the window lies outside the map");
  if (plan.H > 0 &&
      (plan.rows.lower(plan.target_row0) < plan.source_row0 || plan.rows.lower(last) + (plan.rows.share(last) > 0) > bottom))
    return bad_argument("the window lacks source rows of its labels");

  const LossTableMemory<T> memory(plan, a.class_weight, a.label_smoothing);
  if (!memory.ok()) return out_of_memory;
  if (few_classes(plan, FewClasses<T>::loss)) return run<PlanesUnit<T>>(a, plan, memory.columns, memory.tables);
  return run<LossUnit<T>>(a, plan, plan, memory.tables);
}

}  // namespace

Status upsample_cross_entropy(const UpsampleCrossEntropy& a) {
  switch (a.scores.dtype) {
    case DType::float64: return loss<double>(a);
    case DType::float32:
    case DType::float16:
    case DType::bfloat16: return loss<float>(a);
    default: return bad_argument("scores must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace dnc::cpu::DNC_ISA
