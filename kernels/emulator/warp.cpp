// Collectives of a warp: lanes arrive, the last one computes for all. Each lane's operand lies on its own stack.
#include "state.h"

namespace emu {

static void release(Warp& warp, size_t index) {
    Group group = warp.groups[index];
    warp.groups[index] = warp.groups.back();
    warp.groups.pop_back();
    group.kind->run(group.mask, group.slots);
    Fiber* me = current();
    for (uint32_t lanes = group.arrived; lanes; lanes &= lanes - 1) {
        Fiber* fiber = warp.fibers[__builtin_ctz(lanes)];
        if (fiber != me) wake(fiber);
    }
    me->cluster->idle_yields = 0;
}

void collective(const Collective& kind, uint32_t mask, uint32_t qualifier, void* slot) {
    Fiber& fiber = *current();
    Warp& warp = *fiber.warp;
    const uint32_t bit = 1u << fiber.lane;
    if (!(mask & bit)) fail("%s: the mask 0x%08x does not name the calling lane %u", kind.name, mask, fiber.lane);
    size_t index = 0;
    for (; index < warp.groups.size(); ++index) {
        Group& group = warp.groups[index];
        if (!(group.mask & bit)) continue;  // lanes that do not wait for this one
        if (group.kind != &kind || group.qualifier != qualifier || group.mask != mask) {
            fail("lane %u comes to %s with mask 0x%08x and qualifier 0x%x, while lanes 0x%08x of its warp wait in %s with mask "
                 "0x%08x and qualifier 0x%x (%s): all lanes of a mask must come to the same operation", fiber.lane, kind.name,
                 mask, qualifier, group.arrived, group.kind->name, group.mask, group.qualifier,
                 describe_place(*warp.fibers[__builtin_ctz(group.arrived)]).c_str());
        }
        break;
    }
    if (index == warp.groups.size()) warp.groups.push_back({&kind, mask, 0, qualifier, {}});
    Group& group = warp.groups[index];
    group.arrived |= bit;
    group.slots[fiber.lane] = slot;
    if ((group.mask & warp.alive & ~group.arrived) == 0) {
        release(warp, index);
    } else {
        park({kind.name, mask, 0, &kind});
    }
}

void lane_exits(Fiber* fiber) {
    Warp& warp = *fiber->warp;
    for (size_t index = 0; index < warp.groups.size();) {
        const Group& group = warp.groups[index];
        if ((group.mask & warp.alive & ~group.arrived) == 0) {
            release(warp, index);
        } else {
            ++index;
        }
    }
}

// ---- shuffles ----

namespace {
struct ShuffleSlot {
    uint64_t value, result;
    uint32_t parameter;
};

template <int Mode>
void run_shuffle(uint32_t mask, void* const* slots, uint32_t width) {
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(lanes));
        auto* slot = static_cast<ShuffleSlot*>(slots[lane]);
        if (!slot) continue;
        const uint32_t base = lane & ~(width - 1), offset = lane & (width - 1);
        uint32_t source = lane;
        if (Mode == kShuffleIndex) source = base + (slot->parameter & (width - 1));
        if (Mode == kShuffleUp && offset >= slot->parameter) source = lane - slot->parameter;
        if (Mode == kShuffleDown && slot->parameter < width - offset) source = lane + slot->parameter;
        if (Mode == kShuffleXor && (offset ^ slot->parameter) < width) source = base + (offset ^ slot->parameter);
        // A lane outside the mask, or one that has exited, has nothing to give.
        const auto* from = static_cast<const ShuffleSlot*>(slots[source]);
        slot->result = from ? from->value : ~uint64_t(0);
    }
}

template <int Mode, int Width>
void run_shuffle_width(uint32_t mask, void* const* slots) { run_shuffle<Mode>(mask, slots, Width); }

#define EMU_SHUFFLE(name, mode)                                                                                       \
    const Collective name[6] = {{#mode " width 1", run_shuffle_width<mode, 1>}, {#mode " width 2", run_shuffle_width<mode, 2>},  \
                                {#mode " width 4", run_shuffle_width<mode, 4>}, {#mode " width 8", run_shuffle_width<mode, 8>},  \
                                {#mode " width 16", run_shuffle_width<mode, 16>}, {#mode, run_shuffle_width<mode, 32>}};
EMU_SHUFFLE(kIndex, kShuffleIndex)
EMU_SHUFFLE(kUp, kShuffleUp)
EMU_SHUFFLE(kDown, kShuffleDown)
EMU_SHUFFLE(kXor, kShuffleXor)
const Collective* const kShuffles[4] = {kIndex, kUp, kDown, kXor};
}  // namespace

uint64_t shuffle(int mode, uint32_t mask, uint64_t value, uint32_t parameter, uint32_t width) {
    if (width == 0 || width > 32 || (width & (width - 1)) != 0) fail("shuffle: width %u is not 1, 2, 4, 8, 16 or 32", width);
    ShuffleSlot slot = {value, 0, parameter};
    collective(kShuffles[mode][__builtin_ctz(width)], mask, 0, &slot);
    return slot.result;
}

// ---- votes, matches, reductions, the barrier of a warp ----

namespace {
struct VoteSlot {
    bool predicate;
    uint32_t result;
};

uint32_t ballot(uint32_t mask, void* const* slots) {
    uint32_t held = 0;
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        if (slots[lane] && static_cast<VoteSlot*>(slots[lane])->predicate) held |= 1u << lane;
    }
    return held;
}

uint32_t present(uint32_t mask, void* const* slots) {
    uint32_t lanes = 0;
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        if (slots[__builtin_ctz(rest)]) lanes |= rest & -rest;
    }
    return lanes;
}

template <int Mode>
void run_vote(uint32_t mask, void* const* slots) {
    const uint32_t held = ballot(mask, slots), here = present(mask, slots);
    for (uint32_t lanes = here; lanes; lanes &= lanes - 1) {
        auto* slot = static_cast<VoteSlot*>(slots[__builtin_ctz(lanes)]);
        if (Mode == kVoteBallot) slot->result = held;
        if (Mode == kVoteAny) slot->result = held != 0;
        if (Mode == kVoteAll) slot->result = held == here;
        if (Mode == kVoteElect) slot->result = (lanes & -lanes) == (here & -here);
    }
}

const Collective kVotes[] = {{"__ballot_sync", run_vote<kVoteBallot>}, {"__any_sync", run_vote<kVoteAny>},
                             {"__all_sync", run_vote<kVoteAll>}, {"elect.sync", run_vote<kVoteElect>}};

struct MatchSlot {
    uint64_t value;
    uint32_t result;
};

template <bool All>
void run_match(uint32_t mask, void* const* slots) {
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
        auto* slot = static_cast<MatchSlot*>(slots[__builtin_ctz(lanes)]);
        if (!slot) continue;
        uint32_t same = 0, here = 0;
        for (uint32_t rest = mask; rest; rest &= rest - 1) {
            const auto* other = static_cast<const MatchSlot*>(slots[__builtin_ctz(rest)]);
            if (!other) continue;
            here |= rest & -rest;
            if (other->value == slot->value) same |= rest & -rest;
        }
        slot->result = All && same != here ? 0 : same;
    }
}

const Collective kMatchAny = {"__match_any_sync", run_match<false>}, kMatchAll = {"__match_all_sync", run_match<true>};

struct ReduceSlot {
    uint32_t value, result;
};

uint32_t combine(int mode, uint32_t a, uint32_t b) {
    switch (mode) {
        case kReduceAddUnsigned: return a + b;
        case kReduceMinUnsigned: return b < a ? b : a;
        case kReduceMaxUnsigned: return a < b ? b : a;
        case kReduceMinSigned: return static_cast<int>(b) < static_cast<int>(a) ? b : a;
        case kReduceMaxSigned: return static_cast<int>(a) < static_cast<int>(b) ? b : a;
        case kReduceAnd: return a & b;
        case kReduceOr: return a | b;
        default: return a ^ b;
    }
}

template <int Mode>
void run_reduce(uint32_t mask, void* const* slots) {
    bool first = true;
    uint32_t total = 0;
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
        const auto* slot = static_cast<const ReduceSlot*>(slots[__builtin_ctz(lanes)]);
        if (!slot) continue;
        total = first ? slot->value : combine(Mode, total, slot->value);
        first = false;
    }
    for (uint32_t lanes = mask; lanes; lanes &= lanes - 1) {
        if (auto* slot = static_cast<ReduceSlot*>(slots[__builtin_ctz(lanes)])) slot->result = total;
    }
}

const Collective kReductions[] = {
    {"__reduce_add_sync", run_reduce<kReduceAddUnsigned>}, {"__reduce_min_sync(unsigned)", run_reduce<kReduceMinUnsigned>},
    {"__reduce_max_sync(unsigned)", run_reduce<kReduceMaxUnsigned>}, {"__reduce_min_sync(int)", run_reduce<kReduceMinSigned>},
    {"__reduce_max_sync(int)", run_reduce<kReduceMaxSigned>}, {"__reduce_and_sync", run_reduce<kReduceAnd>},
    {"__reduce_or_sync", run_reduce<kReduceOr>}, {"__reduce_xor_sync", run_reduce<kReduceXor>}};

const Collective kSyncWarp = {"__syncwarp", [](uint32_t, void* const*) {}};
}  // namespace

uint32_t vote(int mode, uint32_t mask, bool predicate) {
    VoteSlot slot = {predicate, 0};
    collective(kVotes[mode], mask, 0, &slot);
    return slot.result;
}

uint32_t match(bool all, uint32_t mask, uint64_t value, int* predicate) {
    MatchSlot slot = {value, 0};
    collective(all ? kMatchAll : kMatchAny, mask, 0, &slot);
    if (predicate) *predicate = slot.result != 0;
    return slot.result;
}

uint32_t reduce(int mode, uint32_t mask, uint32_t value) {
    ReduceSlot slot = {value, 0};
    collective(kReductions[mode], mask, 0, &slot);
    return slot.result;
}

void sync_warp(uint32_t mask) {
    char nothing = 0;
    collective(kSyncWarp, mask, 0, &nothing);
}

}  // namespace emu
