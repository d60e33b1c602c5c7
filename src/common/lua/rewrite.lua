#!lua
-- One page of writing a stream anew: XDEL only marks an entry, its bytes stay in memory and in every dump until its neighbours go too.
-- The last page puts the copy, with the same ids, in the stream's place. No allow-oom: it takes the stream's memory twice for a moment.
-- KEYS 1 stream 2 copy   ARGV 1 id after which to go on ('0-0': begin) 2 how many entries at once
-- -> {NEXT, id} | {DONE} | {AGAIN: entries were deleted meanwhile; the copy is dropped} | {GROUPS: it has readers who would lose their place}
if redis.call('EXISTS', KEYS[1]) == 0 then return {'DONE'} end
if #redis.call('XINFO', 'GROUPS', KEYS[1]) > 0 then return {'GROUPS'} end
if ARGV[1] == '0-0' then redis.call('DEL', KEYS[2]) end
local page = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
for _, entry in ipairs(page) do redis.call('XADD', KEYS[2], entry[1], unpack(entry[2])) end
if #page == tonumber(ARGV[2]) then return {'NEXT', page[#page][1]} end

local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if not first then
  redis.call('DEL', KEYS[1], KEYS[2])
  return {'DONE'}
end
redis.call('XTRIM', KEYS[2], 'MINID', first[1])                 -- what was cut off the stream's old end meanwhile
if redis.call('XLEN', KEYS[2]) ~= redis.call('XLEN', KEYS[1]) then
  redis.call('DEL', KEYS[2])
  return {'AGAIN'}
end
redis.call('RENAME', KEYS[2], KEYS[1])
return {'DONE'}
