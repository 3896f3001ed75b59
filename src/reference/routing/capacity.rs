//! What is dropped when experts are full.

use super::super::router::Capacity;
use super::top_k;

/// Drops what exceeds the capacity of an expert: such ids become −1.
///
/// Within each scope, first choices are served before second choices, and so on; among equals, tokens in
/// order, or by falling `importance[T]` (ties to the earlier token). Null experts are never full.
///
/// ```
/// use moe_kernels::reference::{Capacity, apply_capacity};
/// let one = Capacity { per_expert: 1, scope_tokens: None, batch_prioritized: false, normalize_before_drop: false };
/// let mut ids = [0, 1, 0, 2, 1, 0]; // three tokens, two choices each
/// apply_capacity(&one, &mut ids, 2, 3, &[]);
/// assert_eq!(ids, [0, -1, -1, 2, 1, -1]);
/// ```
pub fn apply_capacity(
    capacity: &Capacity,
    ids: &mut [i32],
    k: usize,
    num_experts: usize,
    importance: &[f64],
) {
    let tokens = ids.len() / k;
    let scope = capacity.scope_tokens.unwrap_or(tokens).max(1);
    for start in (0..tokens).step_by(scope) {
        let end = (start + scope).min(tokens);
        let order: Vec<usize> = if capacity.batch_prioritized {
            top_k(&importance[start..end], &[], end - start)
                .iter()
                .map(|i| start + i)
                .collect()
        } else {
            (start..end).collect()
        };
        let mut accepted = vec![0; num_experts];
        for slot in 0..k {
            for &t in &order {
                let id = &mut ids[t * k + slot];
                if *id < 0 || *id as usize >= num_experts {
                    continue;
                }
                if accepted[*id as usize] < capacity.per_expert {
                    accepted[*id as usize] += 1;
                } else {
                    *id = -1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_by_hand() {
        let capacity = |scope_tokens, batch_prioritized| Capacity {
            per_expert: 1,
            scope_tokens,
            batch_prioritized,
            normalize_before_drop: false,
        };
        let dropped = |capacity: &Capacity, importance: &[f64]| {
            let mut ids = [0, 1, 0, 1, 0, 1];
            apply_capacity(capacity, &mut ids, 2, 2, importance);
            ids
        };
        assert_eq!(dropped(&capacity(None, false), &[]), [0, 1, -1, -1, -1, -1]);
        assert_eq!(
            dropped(&capacity(Some(2), false), &[]),
            [0, 1, -1, -1, 0, 1]
        );
        assert_eq!(
            dropped(&capacity(None, true), &[0.1, 0.3, 0.3]),
            [-1, -1, 0, 1, -1, -1]
        );
        // A second choice waits for all first choices.
        let mut ids = [0, 1, 1, 0];
        apply_capacity(&capacity(None, false), &mut ids, 2, 2, &[]);
        assert_eq!(ids, [0, -1, 1, -1]);
        // Null experts are never full.
        let mut ids = [2, 0, 2, 0];
        apply_capacity(&capacity(None, false), &mut ids, 2, 2, &[]);
        assert_eq!(ids, [2, 0, 2, -1]);
    }
}
