--#include run
--#include records
-- A run that this worker cannot execute but another worker may: it is left to others, and claimed in increasing intervals.
local LEFT_MS, LEFT_LONGEST_MS = 5000, 60000

-- left_again_in(run, max_ms[, first_ms]): the number of ms until it is due again, and whether this is the first time.
-- Nil if it was left for max_ms. The count starts again with the next record.
local function left_again_in(run, max_ms, first_ms)
  local mark = digits(run.life) .. ':' .. digits(journal_length(run.id))
  local known, since, count = unpack(redis.call('HMGET', k.run(run.id), 'left_mark', 'left_since', 'left_count'))
  if known == mark then since, count = whole(since), whole(count) else since, count = NOW_MS, 0 end
  local ends_in_ms = since + max_ms - NOW_MS
  if ends_in_ms <= 0 then return nil end
  redis.call('HSET', k.run(run.id), 'left_mark', mark, 'left_since', digits(since), 'left_count', count + 1)
  local delay_ms = (first_ms or LEFT_MS) * 2 ^ math.min(count, 10) * (1 + (NOW_US % 1000) / 4000) -- up to a quarter is added as jitter
  return math.floor(math.min(delay_ms, LEFT_LONGEST_MS, ends_in_ms)), count == 0
end
