// Inline PTX of sm_90a: mbarriers, clusters, TMA, wgmma, register redistribution; one instruction a wrapper, but for
// the loop that waits and the barrier of a cluster. Include it where __CUDA_ARCH_FEAT_SM90_ALL is defined.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moe_ext::cuda::ptx {

// ---- mbarriers: a phase ends when `arrivals` threads have arrived and all announced bytes are there

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA; a __syncthreads() makes them visible to the block, and a cluster_barrier()
// to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and announces bytes that TMA will bring.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity; a new barrier counts as having ended one of parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (ended == 0);
}

// Barrier `id` of 1 to 15 among `threads` threads of the block, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters: blocks that run at the same time and reach each other's shared memory

// Waits for all threads of all blocks of the cluster, none of which may have ended; what they did before, to each
// other's shared memory too, has happened behind it. All threads call.
__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where block `rank` of the cluster has what this block has at `address`: for barrier_arrive_in_cluster().
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
  return found;
}

// As barrier_arrive(), at a barrier of any block of the cluster: gives back memory that was read and has been waited
// for. What was written is not handed over: that takes the scope of the cluster, for which the multiprocessor waits for
// all its writes and empties its L1.
__device__ __forceinline__ void barrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// ---- TMA

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The map's box at (column, row) into shared memory; zeros beyond the tensor. Its bytes count on `barrier`.
__device__ __forceinline__ void load_box(uint32_t destination, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same for every block of the cluster whose bit is set in `blocks`: its bytes go to `destination` in each of them
// and count on `barrier` of each.
__device__ __forceinline__ void load_box_into_blocks(uint32_t destination, const CUtensorMap* map, int column, int row,
                                                     uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3}], [%4], %5;" ::"r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Both, of a map over matrices: the box of one of them, with zeros beyond its rows, too.
__device__ __forceinline__ void load_box(uint32_t destination, const CUtensorMap* map, int column, int row, int matrix,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void load_box_into_blocks(uint32_t destination, const CUtensorMap* map, int column, int row,
                                                     int matrix, uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(destination),
      "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "h"(blocks)
      : "memory");
}

// What this thread wrote to shared memory, copy_async's completed copies included, becomes readable for wgmma and TMA.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers of a warpgroup

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma

// Before the first wgmma, and after other instructions have touched its accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of wgmmas issued since the last call.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` of the warpgroup's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Descriptor of rows of 128 bytes (64 elements of k) in shared memory, in groups of eight that begin at multiples of
// 1024 bytes, the 16-byte chunks of a row XORed with the row: what TMA writes with CU_TENSOR_MAP_SWIZZLE_128B. Adding
// 2 to it advances k by 16 elements. Of the transposed operand, whose rows are k and have 64 of its columns, that takes
// 16 rows: 128.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t address) {
  constexpr uint64_t kGroupStride = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroupStride << 32 | kSwizzle128 << 62;
}

// Eight matrices of 8x8 16-bit elements, given as accumulators hold them, written transposed; lane l gives the address
// of row l % 8 of transposed matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

}  // namespace moe_ext::cuda::ptx
