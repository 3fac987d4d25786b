// What warps ask of global memory, and which sectors a launch touches. Part of runtime.cpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_set>
#include <vector>

#include "blocks.h"

namespace eca::simt {

bool counting = false;

namespace {

constexpr uint64_t kSector = 32;  // bytes

struct Buffer {
  std::string name;
  uint64_t begin, end;
  std::vector<uint8_t> touched[2];  // sectors read, sectors written
};

std::vector<Buffer> buffers;
std::unordered_set<uint64_t> other_touched[2];
std::vector<LaunchTraffic> launch_traffic;

// Lines of a header are the same site in all files that include it.
struct KnownSite {
  Place place;
  Direction direction;
  int number;
};
std::vector<KnownSite> known_sites;

int site_of(Place place, Direction direction) {
  // Comparing the address of the file's name is faster, and mostly enough.
  for (const KnownSite& k : known_sites)
    if (k.place.file == place.file && k.place.line == place.line && k.direction == direction)
      return k.number;
  auto& sites = launch_traffic.back().sites;
  int number = 0;
  for (; number < int(sites.size()); ++number) {
    const SiteTraffic& s = sites[size_t(number)];
    if (same({s.file, s.line}, place) && s.direction == direction) break;
  }
  if (number == int(sites.size())) sites.push_back({place.file, place.line, direction, 0, 0, 0});
  known_sites.push_back({place, direction, number});
  return number;
}

void touch(uint64_t address, uint64_t bytes, bool write) {
  for (Buffer& b : buffers) {
    if (address < b.begin || address >= b.end) continue;
    for (uint64_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s)
      if (s - b.begin / kSector < b.touched[write].size())
        b.touched[write][s - b.begin / kSector] = 1;
    return;
  }
  for (uint64_t s = address / kSector; s <= (address + bytes - 1) / kSector; ++s)
    other_touched[write].insert(s);
}

void close_access(SiteTraffic& traffic, WarpAccess& access) {
  if (access.sectors == 0) return;
  ++traffic.accesses;
  traffic.sectors += access.sectors;
  for (int i = 0; i < access.sectors; ++i)
    traffic.bytes += __builtin_popcount(access.parts[i].bytes);
}

// The warp's lanes are all at one place: passes through a line are counted anew.
void warp_passed(Block& b, int warp) {
  Warp& w = b.warps[size_t(warp)];
  for (size_t site = 0; site < w.accesses.size(); ++site) {
    for (WarpAccess& access : w.accesses[site])
      close_access(launch_traffic.back().sites[site], access);
    w.accesses[site].clear();
  }
  for (auto& passes : w.passes) passes.fill(0);
}

void warps_passed(Block& b) {
  for (int w = 0; w < int(b.warps.size()); ++w) warp_passed(b, w);
}

void start_traffic(Place place) {
  launch_traffic.push_back({place, {}, {}});
  known_sites.clear();
  for (auto& touched : other_touched) touched.clear();
  for (Buffer& b : buffers)
    for (auto& touched : b.touched)
      touched.assign(size_t((b.end + kSector - 1) / kSector - b.begin / kSector), uint8_t(0));
}

void end_traffic() {
  LaunchTraffic& launch = launch_traffic.back();
  for (const Buffer& b : buffers)
    launch.buffers.push_back({b.name, std::count(b.touched[0].begin(), b.touched[0].end(), 1),
                              std::count(b.touched[1].begin(), b.touched[1].end(), 1)});
  launch.buffers.push_back(
      {"other", int64_t(other_touched[0].size()), int64_t(other_touched[1].size())});
}

}  // namespace

void count_access(const void* address, int bytes, Direction direction, bool streamed, Place place) {
  const auto at = reinterpret_cast<uint64_t>(address);
  touch(at, uint64_t(bytes), direction == Direction::kStore);
  if (!streamed) return;
  const auto site = size_t(site_of(place, direction));
  const int lane = self->thread % kLanes;
  Warp& w = self->in->warps[size_t(self->thread / kLanes)];
  if (w.accesses.size() <= site) {
    w.accesses.resize(site + 1);
    w.passes.resize(site + 1, {});
  }
  const size_t pass = w.passes[site][size_t(lane)]++;
  if (w.accesses[site].size() <= pass) w.accesses[site].resize(pass + 1);
  WarpAccess& access = w.accesses[site][pass];
  const uint64_t sector = at / kSector;
  int i = access.sectors - 1;
  while (i >= 0 && access.parts[i].sector != sector) --i;
  if (i < 0) access.parts[i = access.sectors++] = {sector, 0};
  access.parts[i].bytes |= uint32_t((uint64_t(1) << bytes) - 1) << at % kSector;
}

void register_buffer(const std::string& name, const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uint64_t>(address);
  buffers.push_back({name, begin, begin + bytes, {}});
}

void forget_buffers() { buffers.clear(); }

const std::vector<LaunchTraffic>& traffic() { return launch_traffic; }
void reset_traffic() { launch_traffic.clear(); }

SiteTraffic LaunchTraffic::total(Direction direction) const {
  SiteTraffic sum{"", 0, direction, 0, 0, 0};
  for (const SiteTraffic& s : sites)
    if (s.direction == direction) {
      sum.accesses += s.accesses;
      sum.bytes += s.bytes;
      sum.sectors += s.sectors;
    }
  return sum;
}

}  // namespace eca::simt
