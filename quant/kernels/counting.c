/* How many of some ascending thresholds each value has reached, and what that stands for:
 * the CPU's kernel of `counting`, where its meaning is written. Plain C: no header of Python's or
 * of PyTorch's, so that one file serves every version of both; loaded with ctypes.
 *
 * Values are worked on in tiles that stay in the first cache, in three steps: read as float32,
 * count, write. Below FEW thresholds each value is compared with every one of them. Above, a table
 * says for each of some equal cells between the first and the last threshold how many thresholds
 * lie in lower cells; the thresholds of the value's own cell are halved, mostly one comparison.
 * The cell f(x) = (x - T_1) * rate, clipped, never falls as x grows, rounded or not, and is computed
 * for thresholds as for values: the count is exact.
 *
 * NaN counts as +infinity: a comparison `T > x` is false for it.
 */

#include <stdint.h>
#include <string.h>

enum { TILE = 512, FEW = 32, CELLS = 4096, FEWER_CELLS = 512, MOST = 511 };
enum { FLOAT32, BFLOAT16, FLOAT16 };

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  /* arguments */
  const void *x;
  void *values;   /* NULL: none are wanted */
  void *counts;   /* NULL: none are wanted; uint8 up to 255 thresholds, int16 above */
  int64_t size;
  int32_t dtype;  /* of x and the values */
  int32_t shift;
  const float *thresholds;
  int32_t m;
  float scale, zero_point;
  const uint16_t *table; /* for the 16-bit types: what each count >> shift stands for */
  /* plan */
  int64_t next;          /* the first tile that nobody has taken */
  int64_t tiles_at_once;
  int32_t halvings;      /* 0: compare with all */
  float origin, rate, last_cell;
  uint16_t below[CELLS];
  float padded[2 * (MOST + 1)];
} Job;

INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE float from_float16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = (uint32_t)(half & 0x7fff) << 13;
  /* exact, and with no float32 below the normal ones on the way, which a processor may flush */
  float tiny = as_float(size + (113u << 23)) - as_float(113u << 23);
  uint32_t is_tiny = -(uint32_t)(size < (1u << 23)), is_huge = -(uint32_t)(size >= (31u << 23));
  uint32_t bits;
  memcpy(&bits, &tiny, sizeof bits);
  bits = (bits & is_tiny) | ((size + (112u << 23) + (is_huge & (112u << 23))) & ~is_tiny);
  return as_float(bits | sign);
}

INLINE int32_t cell_of(float x, float origin, float rate, float last) {
  float at = (x - origin) * rate;
  at = at < last ? at : last; /* NaN goes up */
  return (int32_t)(at > 0 ? at : 0);
}

INLINE const float *read(const Job *job, int64_t start, int count, float *space) {
  if (job->dtype == FLOAT32) return (const float *)job->x + start;
  const uint16_t *x = (const uint16_t *)job->x + start;
  if (job->dtype == BFLOAT16)
    for (int i = 0; i < count; i++) space[i] = as_float((uint32_t)x[i] << 16);
  else
    for (int i = 0; i < count; i++) space[i] = from_float16(x[i]);
  return space;
}

INLINE void compare_all(const Job *job, const float *restrict x, int32_t *restrict found, int count) {
  const int32_t m = job->m;
  for (int i = 0; i < count; i++) found[i] = m;
  /* `padded` ends with -infinity, which is above nothing */
  int j = 0;
  for (; j + 4 < m; j += 8) {
    const float *t = job->padded + j;
    const float t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
    const float t4 = t[4], t5 = t[5], t6 = t[6], t7 = t[7];
    for (int i = 0; i < count; i++)
      found[i] -= (t0 > x[i]) + (t1 > x[i]) + (t2 > x[i]) + (t3 > x[i]) + (t4 > x[i]) +
                  (t5 > x[i]) + (t6 > x[i]) + (t7 > x[i]);
  }
  if (j < m) {
    const float *t = job->padded + j;
    const float t0 = t[0], t1 = t[1], t2 = t[2], t3 = t[3];
    for (int i = 0; i < count; i++)
      found[i] -= (t0 > x[i]) + (t1 > x[i]) + (t2 > x[i]) + (t3 > x[i]);
  }
}

INLINE void look_up(const Job *job, const float *restrict x, int32_t *restrict found, int count) {
  const float origin = job->origin, rate = job->rate, last = job->last_cell;
  const float *padded = job->padded;
  const int32_t m = job->m;
  for (int i = 0; i < count; i++) found[i] = cell_of(x[i], origin, rate, last);
  for (int i = 0; i < count; i++) found[i] = job->below[found[i]];
  for (int k = job->halvings - 1; k >= 0; k--) {
    const int32_t step = 1 << k;
    for (int i = 0; i < count; i++) found[i] += padded[found[i] + step - 1] > x[i] ? 0 : step;
  }
  for (int i = 0; i < count; i++) found[i] = found[i] < m ? found[i] : m;
}

INLINE void write(const Job *job, int64_t start, const int32_t *restrict found, int count) {
  const int shift = job->shift;
  if (job->values && job->dtype == FLOAT32) {
    float *out = (float *)job->values + start;
    const float scale = job->scale, zero_point = job->zero_point;
    for (int i = 0; i < count; i++) out[i] = ((float)(found[i] >> shift) - zero_point) * scale;
  } else if (job->values) {
    uint16_t *out = (uint16_t *)job->values + start;
    for (int i = 0; i < count; i++) out[i] = job->table[found[i] >> shift];
  }
  if (job->counts && job->m <= 255) {
    uint8_t *out = (uint8_t *)job->counts + start;
    for (int i = 0; i < count; i++) out[i] = (uint8_t)found[i];
  } else if (job->counts) {
    int16_t *out = (int16_t *)job->counts + start;
    for (int i = 0; i < count; i++) out[i] = (int16_t)found[i];
  }
}

FOR_EVERY_PROCESSOR static void run_tile(const Job *job, int64_t start, int count) {
  float space[TILE];
  int32_t found[TILE];
  const float *x = read(job, start, count, space);
  if (job->halvings)
    look_up(job, x, found, count);
  else
    compare_all(job, x, found, count);
  write(job, start, found, count);
}

/* Takes tiles until there are none left; run by each thread. */
static void run(void *data) {
  Job *job = data;
  const int64_t stretch = TILE * job->tiles_at_once;
  for (;;) {
    int64_t start = __atomic_fetch_add(&job->next, stretch, __ATOMIC_RELAXED);
    int64_t end = start + stretch < job->size ? start + stretch : job->size;
    if (start >= job->size) return;
    for (; start < end; start += TILE)
      run_tile(job, start, (int)(end - start < TILE ? end - start : TILE));
  }
}

static int plan(Job *job) {
  const float *t = job->thresholds;
  const int m = job->m;
  for (int j = 0; j < m; j++)
    if (!(t[j] == t[j]) || (j && t[j] < t[j - 1])) return 0;
  memcpy(job->padded, t, m * sizeof *t);
  job->halvings = 0;
  const float infinity = as_float(0x7f800000);
  if (m < FEW) {
    for (int j = m; j < m + 7; j++) job->padded[j] = -infinity;
    return 1;
  }
  for (int j = m; j < 2 * (MOST + 1); j++) job->padded[j] = infinity;
  job->origin = t[0];
  /* few values do not pay for a long table */
  const int cells = job->size < 2 * CELLS ? FEWER_CELLS : CELLS;
  job->last_cell = (float)(cells - 1);
  job->rate = job->last_cell / (t[m - 1] - t[0]);
  int most = m;
  if (job->rate > 0 && job->rate < infinity) {
    most = 0;
    for (int cell = 0, j = 0; cell < cells; cell++) {
      int first = j;
      while (j < m && cell_of(t[j], job->origin, job->rate, job->last_cell) == cell) j++;
      job->below[cell] = (uint16_t)first;
      most = j - first > most ? j - first : most;
    }
  } else
    memset(job->below, 0, sizeof job->below);
  while (most >> job->halvings) job->halvings++;
  return 1;
}

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

/* 1 if done; 0, and nothing is written, if the thresholds do not ascend. `parallel` is OpenMP's
 * GOMP_parallel, so that the threads are those that PyTorch has already started; NULL: none. */
int adq_count(const void *x, int32_t dtype, int64_t size, const float *thresholds, int32_t m,
              int32_t shift, float scale, float zero_point, const uint16_t *table, void *values,
              void *counts, Parallel *parallel, int32_t threads) {
  Job job;
  job.x = x, job.dtype = dtype, job.size = size, job.thresholds = thresholds, job.m = m;
  job.shift = shift, job.scale = scale, job.zero_point = zero_point, job.table = table;
  job.values = values, job.counts = counts;
  job.next = 0, job.tiles_at_once = 16;
  if (m < 1 || m > MOST || !plan(&job)) return 0;
  if (parallel && threads > 1)
    parallel(run, &job, (unsigned)threads, 0);
  else
    run(&job);
  return 1;
}
