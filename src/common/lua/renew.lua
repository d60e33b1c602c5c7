#!lua flags=allow-oom
-- Renew the leases of what is still mine.
-- KEYS 1 stream   ARGV 1 group 2 consumer, then n x {stream id, delivery count}   -> stream ids no longer mine
--#include fence
local ids, mine, lost = {}, {}, {}
for i = 3, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
local owned = held(KEYS[1], ARGV[1], ARGV[2], ids)
for i = 3, #ARGV, 2 do
  local list = owned[ARGV[i]] == ARGV[i + 1] and mine or lost
  list[#list + 1] = ARGV[i]
end
if #mine > 0 then
  mine[#mine + 1] = 'JUSTID'
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, unpack(mine))
end
return lost
