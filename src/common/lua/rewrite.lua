#!lua
-- One page of writing a stream anew: XDEL only marks an entry, its bytes stay in memory and in every dump until its neighbours go too.
-- The last page puts the copy, with the same ids and counters, in the stream's place. No allow-oom: for a moment it takes the stream's
-- memory twice. A page goes on where the copy ends: so runs at once write the same copy together, and it never lacks what stands before
-- its end.
-- KEYS 1 stream 2 copy 3 what is left to erase   ARGV 1 begin anew: 1, else 0 2 how many entries at once 3 most fields of one
-- -> {NEXT} | {DONE: it is listed no more} | {AGAIN: entries were deleted meanwhile; the copy is dropped}
--    | {GROUPS: it has readers who would lose their place} | {WIDE, id: Lua cannot hand on an entry of so many fields}
if redis.call('SISMEMBER', KEYS[3], KEYS[1]) == 0 then return {'DONE'} end
if ARGV[1] == '1' then redis.call('DEL', KEYS[2]) end
if redis.call('EXISTS', KEYS[1]) == 1 and #redis.call('XINFO', 'GROUPS', KEYS[1]) > 0 then
  redis.call('DEL', KEYS[2])
  return {'GROUPS'}
end
local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if not last and ARGV[1] ~= '1' then return {'AGAIN'} end
local page = redis.call('XRANGE', KEYS[1], last and '(' .. last[1] or '-', '+', 'COUNT', ARGV[2])
for _, entry in ipairs(page) do
  if #entry[2] > 2 * tonumber(ARGV[3]) then
    redis.call('DEL', KEYS[2])
    return {'WIDE', entry[1]}
  end
end
for _, entry in ipairs(page) do redis.call('XADD', KEYS[2], entry[1], unpack(entry[2])) end
if #page == tonumber(ARGV[2]) then return {'NEXT'} end

local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if first then                                                     -- a stream without entries holds nothing of what it held
  redis.call('XTRIM', KEYS[2], 'MINID', first[1])                 -- what was cut off the stream's old end meanwhile
  if redis.call('XLEN', KEYS[2]) ~= redis.call('XLEN', KEYS[1]) then
    redis.call('DEL', KEYS[2])
    return {'AGAIN'}
  end
  local about, its = redis.call('XINFO', 'STREAM', KEYS[1]), {}
  for i = 1, #about, 2 do its[about[i]] = about[i + 1] end
  local ever, deleted = its['entries-added'], its['max-deleted-entry-id']
  redis.call('XSETID', KEYS[2], its['last-generated-id'], 'ENTRIESADDED', ever, 'MAXDELETEDID', deleted)
  redis.call('RENAME', KEYS[2], KEYS[1])
end
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[3], KEYS[1])
return {'DONE'}
